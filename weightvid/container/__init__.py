"""The container room."""
