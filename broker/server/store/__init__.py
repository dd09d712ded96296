"""What must not be forgotten: ports for the use cases, rows of the tables, and the SQLite adapter.

Use cases see :mod:`broker.server.store.ports` and :mod:`broker.server.store.rows` only; SQL stays in here.
"""
