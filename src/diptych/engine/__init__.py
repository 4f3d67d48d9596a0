"""Engines: implementations of `core.ports.Engine`. Handed in by the composition root."""
