"""The loader room."""
