"""Measurements: load, comparison, report."""
