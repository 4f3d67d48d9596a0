"""The decisions. Pure: no clock, randomness, thread, socket or file; time is an argument."""
