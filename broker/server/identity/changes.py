"""What the change log says of entries and nodes: one JSON text each, and back. An empty text means: it is gone.

The text stays inside one trust boundary (our own store), so reading it raises plain errors: a text that cannot be read
is a defect, not somebody's nonsense.
"""

import json
from datetime import UTC, datetime
from typing import Any, Final

from broker.registry.entry import Entry
from broker.server.store.rows import Node
from broker.spiffe import Selector, SpiffeId, TrustDomain

ENTRY_KIND: Final = "entry"
NODE_KIND: Final = "node"
GONE: Final = ""


def entry_text(entry: Entry) -> str:
    """Write an entry."""
    return json.dumps(
        {
            "id": entry.id,
            "spiffe_id": str(entry.spiffe_id),
            "parent_id": str(entry.parent_id),
            "selectors": sorted(map(str, entry.selectors)),
            "created_at": _seconds(entry.created_at),
            "x509_svid_ttl": entry.x509_svid_ttl,
            "jwt_svid_ttl": entry.jwt_svid_ttl,
            "federates_with": sorted(domain.name for domain in entry.federates_with),
            "admin": entry.admin,
            "downstream": entry.downstream,
            "expires_at": None if entry.expires_at is None else _seconds(entry.expires_at),
            "dns_names": list(entry.dns_names),
            "revision": entry.revision,
            "store_svid": entry.store_svid,
            "hint": entry.hint,
            "allowed_audiences": sorted(entry.allowed_audiences),
            "may_start_tasks": entry.may_start_tasks,
            "description": entry.description,
            "owner": entry.owner,
            "disable_x509_svid_prefetch": entry.disable_x509_svid_prefetch,
            "jwt_svid_include_jti": entry.jwt_svid_include_jti,
        },
        separators=(",", ":"),
    )


def entry_of(text: str) -> Entry:
    """Read an entry."""
    members: dict[str, Any] = json.loads(text)
    members["spiffe_id"] = SpiffeId(members["spiffe_id"])
    members["parent_id"] = SpiffeId(members["parent_id"])
    members["selectors"] = frozenset(map(Selector, members["selectors"]))
    members["federates_with"] = frozenset(map(TrustDomain, members["federates_with"]))
    members["allowed_audiences"] = frozenset(members["allowed_audiences"])
    members["dns_names"] = tuple(members["dns_names"])
    members["created_at"] = _moment(members["created_at"])
    members["expires_at"] = None if members["expires_at"] is None else _moment(members["expires_at"])
    return Entry(**members)


def node_text(node: Node) -> str:
    """Write a node."""
    return json.dumps(
        {
            "id": str(node.id),
            "attestation_type": node.attestation_type,
            "serial": node.serial,
            "new_serial": node.new_serial,
            "expires_at": _seconds(node.expires_at),
            "selectors": sorted(map(str, node.selectors)),
            "banned": node.banned,
            "reattestable": node.reattestable,
            "agent_version": node.agent_version,
        },
        separators=(",", ":"),
    )


def node_of(text: str) -> Node:
    """Read a node."""
    members: dict[str, Any] = json.loads(text)
    members["id"] = SpiffeId(members["id"])
    members["selectors"] = frozenset(map(Selector, members["selectors"]))
    members["expires_at"] = _moment(members["expires_at"])
    return Node(**members)


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
