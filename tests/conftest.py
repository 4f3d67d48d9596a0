"""Shared by all tests. Its place puts `tests/` on the import path, so helpers are imported by name."""
