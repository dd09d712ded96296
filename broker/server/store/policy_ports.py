"""The port of the store for policies; composed in :mod:`broker.server.store.ports`."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol


class PolicySource(StrEnum):
    """Where a policy comes from."""

    BUILT_IN = "built_in"
    FILE = "file"
    """A file that a server's settings name."""
    PUSHED = "pushed"


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """A policy that was put in force: the highest version decides. ``hash`` is of its text."""

    version: int
    hash: str
    text: str = field(repr=False)
    source: PolicySource
    put_by: str
    put_at: datetime


class PolicyReads(Protocol):
    """Policies, read."""

    def policy(self, hash_: str = "") -> PolicyRow | None:
        """Give the policy in force, or the newest of this hash that is kept; None where there is none."""
        ...


class PolicyWrites(PolicyReads, Protocol):
    """Policies, written."""

    def put_policy(self, row: PolicyRow) -> None:
        """Put in force, under a higher version than any before; of those before some are kept. Conflict(code="stale_version")."""
        ...
