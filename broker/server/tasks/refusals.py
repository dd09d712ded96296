"""Every refusal leaves a record too: in its own transaction, and at a bounded rate.

A flood of refusals must not become a flood of writes: beyond the rate they are counted, and the next record says how many
were left out before it. A refusal whose record cannot be written is refused all the same.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Final

from typing_extensions import override

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.clock import Clock
from broker.errors import BrokerError, Unavailable
from broker.server.store.ports import Store
from broker.server.tasks.policy.decision import DeniedByPolicy
from broker.server.tasks.records import decided, sha256
from broker.server.tasks.requests import Actor, Door
from broker.tasks import NonceWanted, TaskClaims
from broker.tasks.approval import ApprovalPending

PER_SECOND: Final = 50.0
"""Records a second in the long run: a few percent of what the store can write."""
BURST: Final = 500.0
"""Records at once: a test, a misconfigured fleet or a first attack is seen in full."""

STRANGER: Final = "anonymous"
"""The actor of a refusal that came before it was known who asks."""
UNKNOWN: Final = "-"
"""The subject of a refusal that came before the subject was known."""


class _Recorded(AbstractAsyncContextManager[None]):
    """The block around what may be refused; ``actor`` is None for a stranger. A class: a generator for each exchange would cost more than what it does."""

    __slots__ = ("_actor", "_event", "_refusals", "_subject", "_tell", "_told")

    def __init__(
        self,
        refusals: "Refusals",
        event: Event,
        actor: Actor | None,
        subject: str,
        tell: Callable[[BrokerError | None], None] | None = None,
        *,
        told: Mapping[str, FieldValue] | None = None,
    ) -> None:
        self._refusals = refusals
        self._event = event
        self._actor = actor
        self._subject = subject
        self._tell = tell
        self._told = told

    @override
    async def __aenter__(self) -> None:
        return None

    @override
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, BrokerError):
            return
        # Unavailable, NonceWanted, ApprovalPending: nobody was refused, nothing was decided.
        if error is not None and not isinstance(error, Unavailable | NonceWanted | ApprovalPending):
            await self._refusals.refused(self._event, self._actor, self._subject, error, self._told)
        if self._tell is not None:
            self._tell(error)


class Refusals:
    """Writes refusals of the task half."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._known = _Allowance(clock)
        # Their own: strangers must not use up what records the refusals of those we know.
        self._strangers = _Allowance(clock)
        self._writing: set[asyncio.Task[None]] = set()

    def recorded(
        self,
        event: Event,
        actor: Actor,
        subject: str,
        tell: Callable[[BrokerError | None], None] | None = None,
        *,
        told: Mapping[str, FieldValue] | None = None,
    ) -> AbstractAsyncContextManager[None]:
        """Let what happens inside be refused, and record it: ``subject`` is the task or the resource, where it is known.

        ``tell`` hears afterwards how it came out: the error, or None. ``told`` is what else the record says.
        """
        return _Recorded(self, event, actor, subject, tell, told=told)

    @asynccontextmanager
    async def recorded_of(self, event: Event, by: str, subject: str) -> AsyncIterator[None]:
        """Do the same for who is no workload: ``by`` is an operator."""
        try:
            yield
        except Unavailable:
            raise
        except BrokerError as error:
            await self._refused(event, by, subject, error, {"door": "admin"})
            raise

    def recorded_stranger(self, event: Event) -> AbstractAsyncContextManager[None]:
        """Do the same at the HTTPS door before it is known who asks: what a stranger says of himself is not recorded."""
        return _Recorded(self, event, None, "")

    async def note(self, make: Callable[[int], Record]) -> None:
        """Record a refusal of another form; ``make`` is told how many were left out before it."""
        if self._known.take():
            await self._write(make(self._known.left_out()))

    def connection(self, reason: str, address: str) -> None:
        """Record a connection whose certificate was refused before it could ask for anything; does not wait for the store."""
        fields: dict[str, FieldValue] = {"reason": reason, "door": Door.HTTPS.value, "remote": address}
        self._begin(Event.CONNECTION_REFUSED, STRANGER, "", fields)

    def prying(self, event: Event, actor: Actor, claims: TaskClaims) -> None:
        """Record that a workload came with a token of ours which is not its business; does not wait for the store.

        NOTE(security): the answer is the same as for an unknown token, and comes as fast (SV02).
        """
        fields: dict[str, FieldValue] = {
            "reason": "token_not_own",
            "door": actor.door.value,
            "jti_hash": sha256(claims.jti.encode()),
            "audience": claims.aud.text,
        }
        if event is Event.TOKEN_INTROSPECTED:
            fields["active"] = False
        self._begin(event, str(actor.spiffe_id), claims.task.id, fields)

    def _begin(self, event: Event, by: str, subject: str, fields: dict[str, FieldValue]) -> None:
        writing = asyncio.get_running_loop().create_task(self._record(event, by, subject, fields))
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)

    async def refused(
        self,
        event: Event,
        actor: Actor | None,
        subject: str,
        error: BrokerError,
        told: Mapping[str, FieldValue] | None = None,
    ) -> None:
        """Record the refusal of a workload, or of a stranger (None), within the rate; ``told`` is what else there is to say."""
        if actor is None:
            await self._refused(event, STRANGER, subject, error, {"door": Door.HTTPS.value})
            return
        fields: dict[str, FieldValue] = {
            "door": actor.door.value,
            "session": actor.session,
            "node": None if actor.agent is None else str(actor.agent),
            **(told or {}),
        }
        await self._refused(event, str(actor.spiffe_id), subject, error, fields)

    async def _refused(
        self, event: Event, by: str, subject: str, error: BrokerError, told: Mapping[str, FieldValue]
    ) -> None:
        fields: dict[str, FieldValue] = {"reason": error.reason, **told}
        if isinstance(error, DeniedByPolicy):
            fields |= decided(error.decision)
        await self._record(event, by, subject, fields)

    async def _record(self, event: Event, actor: str, subject: str, fields: dict[str, FieldValue]) -> None:
        allowance = self._strangers if actor == STRANGER else self._known
        if not allowance.take():
            return
        if left_out := allowance.left_out():
            fields["reasons"] = [f"left_out:{left_out}"]
        await self._write(Record(event, self._clock.now(), actor, subject or UNKNOWN, fields))

    async def _write(self, record: Record) -> None:
        with contextlib.suppress(Unavailable):
            await self._store.write(lambda writer: writer.record(record))


class _Allowance:
    """So many records in a burst, and so many a second after it; what was left out is counted."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._left = BURST
        self._counted_at = clock.monotonic()
        self._left_out = 0

    def take(self) -> bool:
        now = self._clock.monotonic()
        self._left = min(BURST, self._left + (now - self._counted_at) * PER_SECOND)
        self._counted_at = now
        if self._left < 1:
            self._left_out += 1
            return False
        self._left -= 1
        return True

    def left_out(self) -> int:
        count, self._left_out = self._left_out, 0
        return count
