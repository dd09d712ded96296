"""What a verifier knows of ends: a state machine fed by frames, with no I/O of its own.

Invariants: before the first whole snapshot nothing is alive; knowledge only grows more restrictive until a new snapshot
replaces it; a frame is forgotten only when no token that it kills can still be within its life. Silence is not good news:
:meth:`FeedState.liveness` turns it into STALE and PARTITIONED.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from broker._proto.broker.server.v1 import feed_pb2
from broker.errors import Refused, Unavailable
from broker.tasks import TaskClaims

STALE_AFTER = 3.0
"""Seconds without a message before the verifier no longer knows: three missed heartbeats."""

PARTITIONED_AFTER = 30.0
"""Seconds without a message after which nothing is accepted, whatever its risk."""

SUSPENDED = "suspended"
"""The state in a frame of a task that may go on: its tokens are dead, later ones need not be."""

FORGET_EVERY = 256
"""Frames between two sweeps of what may be forgotten."""


NEVER = 2**63
"""Above every epoch."""


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
    # root or task -> (first living epoch, whether it is only suspended, forget_at)
    epochs: dict[str, tuple[int, bool, int]] = field(default_factory=dict)
    tasks: dict[str, tuple[int, bool, int]] = field(default_factory=dict)
    sessions: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    stops: dict[tuple[str, str, str], tuple[int, int]] = field(default_factory=dict)  # -> (first iat, forget_at)

    def sweep(self, now: int) -> None:
        self.epochs = {k: v for k, v in self.epochs.items() if v[2] > now}
        self.tasks = {k: v for k, v in self.tasks.items() if v[2] > now}
        self.sessions = {k: v for k, v in self.sessions.items() if v > now}
        self.tokens = {k: v for k, v in self.tokens.items() if v > now}
        self.stops = {k: v for k, v in self.stops.items() if v[1] > now}


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
            _raise(dead.epochs, frame.root, frame.epoch, frame)
        elif frame.kind == "task":
            # A task that is over has no living epoch; one that is suspended may go on, with tokens of a later one.
            _raise(dead.tasks, frame.task, frame.epoch if frame.state == SUSPENDED else NEVER, frame)
        elif frame.kind == "session":
            dead.sessions[frame.session] = max(dead.sessions.get(frame.session, 0), until)
        elif frame.kind == "token":
            dead.tokens[frame.jti] = max(dead.tokens.get(frame.jti, 0), until)
        elif frame.kind in ("user", "agent", "audience"):
            key = (frame.kind, frame.name, frame.sid)
            not_before, kept = dead.stops.get(key, (0, 0))
            dead.stops[key] = (max(not_before, frame.not_before), max(kept, until))
        elif frame.kind == "keys":
            self.keys = frame.keys
        else:
            # A newer server ends things in ways we do not know: what we cannot apply, we must not pretend to have applied.
            raise Unavailable(f"unknown frame kind {frame.kind!r}", code="feed_unknown_frame", hint="upgrade this SDK")

    def silence(self, monotonic: float) -> float:
        """Give the seconds since anything was heard; infinite before the first whole snapshot."""
        return inf if self._heard_at is None else monotonic - self._heard_at

    def liveness(self, monotonic: float) -> Liveness:
        """Say how much is known at ``monotonic`` seconds."""
        if self._heard_at is None:
            return Liveness.UNKNOWN
        silence = self.silence(monotonic)
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

    def require_good(self, claims: TaskClaims) -> None:
        """Refuse a token of which anything has ended; raises Refused as :meth:`require_alive` and :meth:`require_going` do."""
        task = claims.task
        session = None if claims.cnf is None else claims.cnf.session
        self.require_alive(root=task.root, epoch=task.epoch, task=task.id, session=session, jti=claims.jti)
        self.require_going(
            user=claims.sub,
            user_session=claims.sid,
            agent=str(claims.client_id),
            audience=claims.aud.text,
            issued_at=claims.iat,
        )

    def require_alive(self, *, root: str, epoch: int, task: str, session: str | None, jti: str) -> None:
        """Refuse what has ended.

        Raises:
            Refused: the task, its tree, its workload session or this one token has ended, or it was suspended since.
        """
        dead = self._dead
        # Over before suspended: of two reasons the one that nothing undoes.
        known = [each for each in (dead.epochs.get(root), dead.tasks.get(task)) if each is not None and epoch < each[0]]
        if any(not is_suspended for _, is_suspended, _ in known):
            raise Refused("the task has ended", code="task_ended", hint="start a new task")
        if known:
            raise Refused("the task was suspended", code="task_suspended", hint="resume it, then ask for a new token")
        if session is not None and session in dead.sessions:
            raise Refused("the workload session has ended", code="session_ended", hint="a new process needs a new task")
        if jti in dead.tokens:
            raise Refused("the token was revoked", code="token_revoked", hint="ask for a new token")

    def require_going(
        self, *, user: str, user_session: str | None, agent: str, audience: str | None, issued_at: int
    ) -> None:
        """Refuse a token that was issued before its user, agent or audience was stopped; ``issued_at`` is its ``iat``.

        A transaction token names neither session nor audience: a stop of those ends its task, each with a frame of its own.

        Raises:
            Refused: the user was stopped, or the session; the agent; or all that is done at the audience.
        """
        stops = self._dead.stops
        if not stops:
            return
        names = [("user", user, ""), ("agent", agent, "")]
        if audience is not None:
            names.append(("audience", audience, ""))
        if user_session is not None:
            names.append(("user", user, user_session))
        for name in names:
            if issued_at < stops.get(name, (0, 0))[0]:
                raise Refused(
                    f"what the {name[0]} had until then was stopped", code=f"{name[0]}_stopped", hint="start a new task"
                )


def _raise(known: dict[str, tuple[int, bool, int]], name: str, epoch: int, frame: feed_pb2.Frame) -> None:
    before, is_suspended, kept = known.get(name, (0, False, 0))
    if epoch >= before:
        before, is_suspended = epoch, frame.state == SUSPENDED
    known[name] = (before, is_suspended, max(kept, frame.forget_at))
