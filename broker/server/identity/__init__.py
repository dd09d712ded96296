"""The identity half: nodes, entries, SVIDs and bundles. Use cases over values; the wire is in ``server/api``."""
