"""Faults on real processes: what a served fleet does when a process or a connection fails at a chosen moment."""
