"""The parts of packing: one tensor at a time to levels, levels to frames, frames to the archive."""
