"""The model that comes along."""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).parent / "builtin_model"
NAME = "recall"
