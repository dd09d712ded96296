"""The tables, a module per group: portable SQL in, frozen values out. They know no connection but the one handed in."""

from typing_extensions import override

from broker.server.store.tables.actions import ActionReading, ActionWriting
from broker.server.store.tables.approvals import ApprovalReading, ApprovalWriting
from broker.server.store.tables.authorities import AuthorityReading, AuthorityWriting
from broker.server.store.tables.delegations import DelegationReading, DelegationWriting
from broker.server.store.tables.entries import EntryReading, EntryWriting
from broker.server.store.tables.federation import FederationReading, FederationWriting
from broker.server.store.tables.frames import FrameReading, FrameWriting
from broker.server.store.tables.housekeeping import Sweeping
from broker.server.store.tables.idempotency import IdempotencyWriting
from broker.server.store.tables.life import LifeReading, LifeWriting
from broker.server.store.tables.nodes import NodeReading, NodeWriting
from broker.server.store.tables.policies import PolicyReading, PolicyWriting
from broker.server.store.tables.proofs import ProofReading, ProofWriting
from broker.server.store.tables.revocations import RevocationReading, RevocationWriting
from broker.server.store.tables.sessions import SessionReading, SessionWriting
from broker.server.store.tables.supervision import SupervisionReading
from broker.server.store.tables.tasks import TaskWriting
from broker.server.store.tables.tokens import TokenReading, TokenWriting
from broker.server.store.tables.trail import TrailReading
from broker.server.store.tables.users import UserReading, UserWriting


class SqlReader(
    SupervisionReading,
    TrailReading,
    FederationReading,
    EntryReading,
    NodeReading,
    AuthorityReading,
    SessionReading,
    UserReading,
    DelegationReading,
    TokenReading,
    FrameReading,
    RevocationReading,
    PolicyReading,
    LifeReading,
    ProofReading,
    ActionReading,
    ApprovalReading,
):
    """Everything that can be read, through one connection."""


class SqlWriter(
    FrameWriting,
    FederationWriting,
    EntryWriting,
    NodeWriting,
    AuthorityWriting,
    SessionWriting,
    UserWriting,
    DelegationWriting,
    TaskWriting,
    TokenWriting,
    SupervisionReading,
    IdempotencyWriting,
    RevocationWriting,
    PolicyWriting,
    LifeWriting,
    ProofWriting,
    ActionWriting,
    ApprovalWriting,
    Sweeping,
):
    """Everything that can be read and written, through the writer's connection."""

    @override
    def undo(self, keep: int) -> None:
        super().undo(keep)
        self.forget_parsed()
        self._sql.forget()


__all__ = ["SqlReader", "SqlWriter"]
