"""The quantize room."""
