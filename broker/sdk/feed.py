"""What a verifier knows of ends: a state machine fed by frames, with no I/O of its own.

Invariants: before the first whole snapshot nothing is alive; knowledge only grows more restrictive until a new snapshot
replaces it; a frame is forgotten only when no token that it kills can still be within its life. Silence is not good news:
:meth:`FeedState.liveness` turns it into STALE and PARTITIONED.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from broker._proto.broker.server.v1 import feed_pb2
from broker.errors import Refused, Unavailable

STALE_AFTER = 3.0
"""Seconds without a message before the verifier no longer knows: three missed heartbeats."""

PARTITIONED_AFTER = 30.0
"""Seconds without a message after which nothing is accepted, whatever its risk."""

FORGET_EVERY = 256
"""Frames between two sweeps of what may be forgotten."""


class Liveness(StrEnum):
    """How much the verifier knows at this moment."""

    UNKNOWN = "unknown"
    LIVE = "live"
    STALE = "stale"
    PARTITIONED = "partitioned"


class Risk(StrEnum):
    """What a service is worth: decides what it does while it does not know."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


@dataclass(slots=True)
class _Dead:
    epochs: dict[str, tuple[int, int]] = field(default_factory=dict)  # root -> (first living epoch, forget_at)
    tasks: dict[str, int] = field(default_factory=dict)
    sessions: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def sweep(self, now: int) -> None:
        self.epochs = {k: v for k, v in self.epochs.items() if v[1] > now}
        self.tasks = {k: v for k, v in self.tasks.items() if v > now}
        self.sessions = {k: v for k, v in self.sessions.items() if v > now}
        self.tokens = {k: v for k, v in self.tokens.items() if v > now}


class FeedState:
    """The dead, the keys and the freshness, as told by one feed."""

    def __init__(self) -> None:
        """Know nothing, and so accept nothing."""
        self._dead = _Dead()
        self._pending: _Dead | None = None
        self._heard_at: float | None = None
        self._ready = False
        self._applied = 0
        self.issuer = ""
        self.bindings: dict[str, frozenset[str]] = {}
        """What the tokens of each published audience may be bound to."""
        self.keys = ""
        self.store = ""
        self.seq = 0

    def apply(self, message: feed_pb2.FeedMessage, *, monotonic: float, now: int) -> bool:
        """Take one message in; true when the keys, or what is published of audiences, may have changed. ``now`` is in seconds since 1970."""
        kind = message.WhichOneof("kind")
        before = self.keys, self.bindings
        if kind == "snapshot":
            self._snapshot(message)
        elif kind == "frame":
            self._frame(self._dead, message.frame)
            self.seq = max(self.seq, message.seq)
        if self._ready:
            self._heard_at = monotonic
        self._applied += 1
        if self._applied % FORGET_EVERY == 0:
            self._dead.sweep(now)
        return (self.keys, self.bindings) != before

    def _snapshot(self, message: feed_pb2.FeedMessage) -> None:
        snapshot = message.snapshot
        pending = self._pending or _Dead()
        self._take(pending, snapshot.frames)
        if snapshot.more:
            self._pending = pending
            return
        self._dead, self._pending, self._ready = pending, None, True
        self.issuer, self.keys = snapshot.issuer, snapshot.keys
        self.bindings = {each.resource: frozenset(each.binding) for each in snapshot.audiences}
        self.seq, self.store = message.seq, message.store

    def _take(self, dead: _Dead, frames: Iterable[feed_pb2.Frame]) -> None:
        for frame in frames:
            self._frame(dead, frame)

    def _frame(self, dead: _Dead, frame: feed_pb2.Frame) -> None:
        until = frame.forget_at
        if frame.kind == "subtree":
            epoch, kept = dead.epochs.get(frame.root, (0, 0))
            dead.epochs[frame.root] = (max(epoch, frame.epoch), max(kept, until))
        elif frame.kind == "task":
            dead.tasks[frame.task] = max(dead.tasks.get(frame.task, 0), until)
        elif frame.kind == "session":
            dead.sessions[frame.session] = max(dead.sessions.get(frame.session, 0), until)
        elif frame.kind == "token":
            dead.tokens[frame.jti] = max(dead.tokens.get(frame.jti, 0), until)
        elif frame.kind == "keys":
            self.keys = frame.keys
        else:
            # A newer server ends things in ways we do not know: what we cannot apply, we must not pretend to have applied.
            raise Unavailable(f"unknown frame kind {frame.kind!r}", code="feed_unknown_frame", hint="upgrade this SDK")

    def liveness(self, monotonic: float) -> Liveness:
        """Say how much is known at ``monotonic`` seconds."""
        if self._heard_at is None:
            return Liveness.UNKNOWN
        silence = monotonic - self._heard_at
        if silence <= STALE_AFTER:
            return Liveness.LIVE
        return Liveness.STALE if silence <= PARTITIONED_AFTER else Liveness.PARTITIONED

    def require_fresh(self, monotonic: float, risk: Risk) -> None:
        """Refuse when too little is known for this risk.

        Raises:
            Unavailable: no snapshot yet, or the silence is too long.
        """
        state = self.liveness(monotonic)
        if state is Liveness.LIVE or (state is Liveness.STALE and risk is not Risk.HIGH):
            return
        raise Unavailable(
            f"the revocation feed is {state.value}: refusing rather than guessing",
            code=f"feed_{state.value}",
            hint="is the node agent up, and can it reach the server?",
        )

    def require_alive(self, *, root: str, epoch: int, task: str, session: str | None, jti: str) -> None:
        """Refuse what has ended.

        Raises:
            Refused: the task, its tree, its workload session or this one token has ended.
        """
        dead = self._dead
        known = dead.epochs.get(root)
        if (known is not None and epoch < known[0]) or task in dead.tasks:
            raise Refused("the task has ended", code="task_ended", hint="start a new task")
        if session is not None and session in dead.sessions:
            raise Refused("the workload session has ended", code="session_ended", hint="a new process needs a new task")
        if jti in dead.tokens:
            raise Refused("the token was revoked", code="token_revoked", hint="ask for a new token")
