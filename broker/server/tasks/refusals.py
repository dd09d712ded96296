"""Every refusal leaves a record too: in its own transaction, and at a bounded rate.

A flood of refusals must not become a flood of writes: beyond the rate they are counted, and the next record says how many
were left out before it. A refusal whose record cannot be written is refused all the same.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Final

from typing_extensions import override

from broker.audit.events import Event, FieldValue, Record
from broker.clock import Clock
from broker.errors import BrokerError, Unavailable
from broker.server.store.ports import Store
from broker.server.tasks.policy.decision import DeniedByPolicy
from broker.server.tasks.records import decided
from broker.server.tasks.requests import Actor

PER_SECOND: Final = 50.0
"""Records a second in the long run: a few percent of what the store can write."""
BURST: Final = 500.0
"""Records at once: a test, a misconfigured fleet or a first attack is seen in full."""

UNKNOWN: Final = "-"
"""The subject of a refusal that came before the subject was known."""


class _Recorded(AbstractAsyncContextManager[None]):
    """The block of :meth:`Refusals.recorded`. A class: a generator for each exchange would cost more than what it does."""

    __slots__ = ("_actor", "_event", "_refusals", "_subject", "_tell")

    def __init__(
        self,
        refusals: "Refusals",
        event: Event,
        actor: Actor,
        subject: str,
        tell: Callable[[BrokerError | None], None] | None,
    ) -> None:
        self._refusals = refusals
        self._event = event
        self._actor = actor
        self._subject = subject
        self._tell = tell

    @override
    async def __aenter__(self) -> None:
        return None

    @override
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, BrokerError):
            return
        # Unavailable: nobody was refused, nothing was decided.
        if error is not None and not isinstance(error, Unavailable):
            await self._refusals.record(self._event, self._actor, self._subject, error)
        if self._tell is not None:
            self._tell(error)


class Refusals:
    """Writes refusals of the task half."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._allowance = BURST
        self._counted_at = clock.monotonic()
        self._left_out = 0

    def recorded(
        self, event: Event, actor: Actor, subject: str, tell: Callable[[BrokerError | None], None] | None = None
    ) -> AbstractAsyncContextManager[None]:
        """Let what happens inside be refused, and record it: ``subject`` is the task or the resource, where it is known.

        ``tell`` hears afterwards how it came out: the error, or None.
        """
        return _Recorded(self, event, actor, subject, tell)

    async def note(self, make: Callable[[int], Record]) -> None:
        """Record a refusal of another form; ``make`` is told how many were left out before it."""
        if not self._may_write():
            self._left_out += 1
            return
        left_out, self._left_out = self._left_out, 0
        record = make(left_out)
        with contextlib.suppress(Unavailable):
            await self._store.write(lambda writer: writer.record(record))

    async def record(self, event: Event, actor: Actor, subject: str, error: BrokerError) -> None:
        """Record one refusal, within the rate."""
        if not self._may_write():
            self._left_out += 1
            return
        left_out, self._left_out = self._left_out, 0
        fields: dict[str, FieldValue] = {
            "reason": error.reason,
            "door": actor.door.value,
            "session": actor.session,
            "node": None if actor.agent is None else str(actor.agent),
        }
        if isinstance(error, DeniedByPolicy):
            fields |= decided(error.decision)
        if left_out:
            fields["reasons"] = [f"left_out:{left_out}"]
        record = Record(event, self._clock.now(), str(actor.spiffe_id), subject or UNKNOWN, fields)
        with contextlib.suppress(Unavailable):
            await self._store.write(lambda writer: writer.record(record))

    def _may_write(self) -> bool:
        now = self._clock.monotonic()
        self._allowance = min(BURST, self._allowance + (now - self._counted_at) * PER_SECOND)
        self._counted_at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True
