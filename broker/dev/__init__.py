"""A development estate on one machine, and the story of ``broker demo``. Real processes, loopback only, never for production.

Starts the programs as anybody would, by their command line. Refuses to know what happens inside them.
"""
