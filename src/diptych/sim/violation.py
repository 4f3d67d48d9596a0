"""What a simulation looks for."""


class Violation(Exception):
    """Something happened that must never happen. The message says what, in plain words."""
