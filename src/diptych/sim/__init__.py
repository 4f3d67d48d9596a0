"""The fleet without machines: the live system's policy objects under a virtual clock, with seeded faults."""
