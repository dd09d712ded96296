"""The port of the store: what use cases may ask of it, without a word of SQL.

A *write* is one act: a plain function over a :class:`Writer`, run alone (no other act between its statements), wholly or not at
all, and acknowledged only when it is durable. An act that raises leaves nothing behind. An act must be quick, must not block, must
not await, and keeps nothing outside: one that was undone may run again. What it returns is handed out after the commit. A *read* is a plain function over a :class:`Reader` and sees one
consistent snapshot, never an uncommitted row. Every adapter passes ``tests/contract``.

Whatever the storage refuses (full, read-only, overloaded, cut off) is ``Unavailable``: the outcome of a write is then unknown to
the caller, who repeats it under the same idempotency key.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

from broker.server.store.action_ports import ActionReads, ActionWrites
from broker.server.store.approval_ports import ApprovalReads, ApprovalWrites
from broker.server.store.federation_ports import FederationReads, FederationWrites
from broker.server.store.life_ports import LifeReads, LifeWrites
from broker.server.store.policy_ports import PolicyReads, PolicyWrites
from broker.server.store.proof_ports import ProofReads, ProofWrites
from broker.server.store.revocation_ports import RevocationReads, RevocationWrites
from broker.server.store.rows import Change
from broker.server.store.supervision_ports import SupervisionReads
from broker.server.store.table_ports import (
    AuthorityReads,
    AuthorityWrites,
    EntryReads,
    EntryWrites,
    FrameReads,
    FrameWrites,
    Housekeeping,
    IdempotencyWrites,
    NodeReads,
    NodeWrites,
    SessionReads,
    SessionWrites,
    TaskReads,
    TaskWrites,
    TokenReads,
    TokenWrites,
    TrailReads,
    TrailWrites,
)
from broker.server.store.user_ports import UserReads, UserWrites

T = TypeVar("T")


_MARK: Final = "makes_nothing_due"


def making_nothing_due(act: Callable[["Writer"], T]) -> Callable[["Writer"], T]:
    """Mark an act after which nobody has to look whether something is over: a sweep itself, a sign of life."""
    setattr(act, _MARK, True)
    return act


def makes_nothing_due(act: Callable[["Writer"], object]) -> bool:
    """Tell whether an act is marked so."""
    return getattr(act, _MARK, False)


class Reader(
    TrailReads,
    EntryReads,
    NodeReads,
    AuthorityReads,
    FederationReads,
    SessionReads,
    TaskReads,
    TokenReads,
    FrameReads,
    RevocationReads,
    PolicyReads,
    UserReads,
    SupervisionReads,
    LifeReads,
    ProofReads,
    ActionReads,
    ApprovalReads,
    Protocol,
):
    """All that a read may ask, from one snapshot."""


class Writer(
    TrailWrites,
    EntryWrites,
    NodeWrites,
    AuthorityWrites,
    FederationWrites,
    SessionWrites,
    TaskWrites,
    TokenWrites,
    FrameWrites,
    IdempotencyWrites,
    RevocationWrites,
    PolicyWrites,
    UserWrites,
    SupervisionReads,
    LifeWrites,
    ProofWrites,
    ActionWrites,
    ApprovalWrites,
    Housekeeping,
    Protocol,
):
    """All that an act may do; it sees its own writes."""


class Store(Protocol):
    """The store: one writer, many readers, and a feed of what was committed."""

    @property
    def id(self) -> str:
        """The store's own name, made with it: cursors of another store mean nothing here."""
        ...

    @property
    def head(self) -> int:
        """The number of the last change that subscribers were told of."""
        ...

    @property
    def is_current(self) -> bool:
        """Tell whether subscribers were told of all that was committed until a moment ago, by whichever server.

        False while the store cannot know: what memory holds may then be behind, and silence says nothing.
        """
        ...

    @property
    def written(self) -> int:
        """How many acts this process has asked for: while it stays, nothing was written from here that can be over once.

        Acts marked by :func:`making_nothing_due` do not count.
        """
        ...

    @property
    def is_shared(self) -> bool:
        """Tell whether other servers may write to it, too."""
        ...

    async def write(self, act: Callable[[Writer], T]) -> T:
        """Run one act and give its result once it is durable; Unavailable, or what the act raised."""
        ...

    async def read(self, query: Callable[[Reader], T]) -> T:
        """Run one query on a committed snapshot; Unavailable, or what the query raised."""
        ...

    def subscribe(self, callback: Callable[[Sequence[Change]], None]) -> Callable[[], None]:
        """Have committed changes told, in order, on the event loop, before the writer's ``write`` returns.

        Give the function that ends the subscription. The callback must not block.
        """
        ...

    async def check(self) -> None:
        """Raise Unavailable when the store cannot be read or written, or is not the one that was opened."""
        ...


__all__ = [
    "ActionReads",
    "ActionWrites",
    "ApprovalReads",
    "ApprovalWrites",
    "AuthorityReads",
    "AuthorityWrites",
    "EntryReads",
    "EntryWrites",
    "FederationReads",
    "FederationWrites",
    "FrameReads",
    "FrameWrites",
    "Housekeeping",
    "IdempotencyWrites",
    "LifeReads",
    "LifeWrites",
    "NodeReads",
    "NodeWrites",
    "PolicyReads",
    "PolicyWrites",
    "ProofReads",
    "ProofWrites",
    "Reader",
    "RevocationReads",
    "RevocationWrites",
    "SessionReads",
    "SessionWrites",
    "Store",
    "SupervisionReads",
    "TaskReads",
    "TaskWrites",
    "TokenReads",
    "TokenWrites",
    "TrailReads",
    "TrailWrites",
    "UserReads",
    "UserWrites",
    "Writer",
]
