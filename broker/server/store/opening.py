"""What every store asks itself when it opens: its name, and whether the end of its audit chain holds."""

import secrets
from typing import Final

from broker.audit.chain import GENESIS, ChainHead
from broker.audit.verify import ChainBroken, verify_chain
from broker.errors import Misconfigured
from broker.server.store.sql import Sql
from broker.server.store.table_ports import TrailReads

CHECKED_AT_START: Final = 1_000
"""Audit records checked when the store opens: the end is what a crash or a half-restored copy would damage."""

_NAME_IT: Final = "INSERT INTO store_facts (name, value) VALUES ('id', ?) ON CONFLICT (name) DO NOTHING"
_NAME: Final = "SELECT value FROM store_facts WHERE name = 'id'"


def store_id(sql: Sql) -> str:
    """Give the store's own name, made with it: of two who open it first, one names it."""
    sql.run(_NAME_IT, (secrets.token_hex(16),))
    row = sql.row(_NAME)
    assert row is not None
    name: str = row[0]
    return name


def check_chain_end(tables: TrailReads) -> None:
    """Raise Misconfigured(code="store_audit_broken") when the last records of the audit chain do not follow each other."""
    start = GENESIS
    before = max(0, tables.chain_head().seq - CHECKED_AT_START)
    if before:
        link = tables.records(before - 1, 1)[0]
        start = ChainHead(link.seq, link.hash)
    try:
        verify_chain(tables.records(before, CHECKED_AT_START), start=start)
    except ChainBroken as error:
        raise Misconfigured(
            f"the end of the audit chain does not hold: {error.message}",
            code="store_audit_broken",
            hint="keep a copy for the investigation, and restore the database from a backup",
        ) from error
