"""Which store a URL names. A driver is loaded only by who uses it."""

from contextlib import AbstractAsyncContextManager
from typing import Final

from broker.clock import Clock
from broker.errors import Misconfigured
from broker.server.store.location import database_path
from broker.server.store.ports import Store
from broker.server.store.sqlite import SqliteStore

POSTGRES_SCHEMES: Final = ("postgresql://", "postgres://")


def open_store(url: str, *, clock: Clock) -> AbstractAsyncContextManager[Store]:
    """Open the store at a URL for as long as the block lasts; raises Misconfigured, Unavailable."""
    if not url.startswith(POSTGRES_SCHEMES):
        return SqliteStore.open(database_path(url), clock=clock)
    try:
        from broker.server.store.postgres import PostgresStore  # noqa: PLC0415  # an extra: not everybody has the driver
    except ImportError as error:
        raise Misconfigured(
            f"the driver for PostgreSQL is not there: {error.msg}",
            code="store_driver_missing",
            hint="pip install 'identity-broker[postgres]'",
        ) from None
    return PostgresStore.open(url, clock=clock)
