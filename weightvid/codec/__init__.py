"""The codec room."""
