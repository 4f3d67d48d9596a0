"""Faults on purpose: named places where a process can be made to fail, and a proxy that spoils a connection.

Nothing here does anything in a server that runs without the two environment variables of `chaos.failpoints`
and `chaos.detour`.
"""
