"""Neural-network weights as HEVC video."""
