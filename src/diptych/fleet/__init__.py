"""Launching and supervising worker processes."""
