"""The nouns of the system. Standard library only; imports nothing else of diptych."""
