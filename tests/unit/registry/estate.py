"""Entries to test with: short words for what matters, defaults for the rest."""

from datetime import UTC, datetime, timedelta
from typing import Any

from broker.registry import Entry
from broker.spiffe import Selector, SpiffeId

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
SERVER = "spiffe://example.org/spire/server"
AGENT = SpiffeId("spiffe://example.org/spire/agent/join_token/one")


def selectors(*texts: str) -> frozenset[Selector]:
    return frozenset(Selector(text) for text in texts)


def entry(entry_id: str, *needs: str, parent: str | SpiffeId = AGENT, spiffe_id: str = "/web", **fields: Any) -> Entry:
    return Entry(
        **{
            "id": entry_id,
            "spiffe_id": SpiffeId("spiffe://example.org" + spiffe_id),
            "parent_id": parent if isinstance(parent, SpiffeId) else SpiffeId(parent),
            "selectors": selectors(*(needs or ("unix:uid:1000",))),
            "created_at": NOW - timedelta(days=1),
        }
        | fields
    )
