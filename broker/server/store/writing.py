"""The event loop's side of writing: who waits, when a group starts, and who is told what after its COMMIT.

All of it runs on the event loop's thread; the statements and the COMMIT run on the writer's.

While a group's statements run, the loop stands still, for at most ``HOLD_SECONDS``; during the COMMIT it goes on. The reason is
the interpreter's lock: the driver gives it away at every statement, and a busy loop hands it back only after the switch interval,
at best. Measured with a loop that never idles, 32 callers: p99 108 ms without the pause, 28 ms with it. The statements need the
same processor time either way, for they are memory work; the fsync is what the loop must not wait for.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

from broker.errors import Unavailable
from broker.server.store.group import Act, Group
from broker.server.store.ports import Writer
from broker.server.store.rows import Change

QUEUE_LIMIT: Final = 4_096
"""Acts that may wait: about a second of work. Whoever comes then is better told to try again than kept waiting."""
GROUP_LIMIT: Final = 64
"""Acts per COMMIT: enough to share its price, and some milliseconds of statements at most."""
HOLD_SECONDS: Final = 0.02
"""How long the loop stands still for one group: beyond it something is slow (a disk, a huge act), and others come first."""

T = TypeVar("T")
Subscriber = Callable[[Sequence[Change]], None]


class WriteQueue:
    """Acts that wait for the writer, gathered into groups, one group at a time."""

    def __init__(self, submit: Callable[[Group], None], loop: asyncio.AbstractEventLoop) -> None:
        """Hand groups to ``submit``; be told of their end through :meth:`settle_soon`."""
        self._submit = submit
        self._loop = loop
        self._waiting: deque[Act] = deque()
        self._running = 0
        self._is_busy = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._subscribers: list[Subscriber] = []
        self.head = 0
        """The number of the last change that subscribers were told of."""

    async def put(self, run: Callable[[Writer], T]) -> T:
        """Run an act and give its result after its COMMIT; raises what it raised, or Unavailable."""
        if len(self._waiting) + self._running >= QUEUE_LIMIT:
            raise Unavailable(
                f"{QUEUE_LIMIT} writes are waiting already", code="store_overloaded", hint="try again in a moment"
            )
        future: asyncio.Future[T] = self._loop.create_future()
        self._waiting.append(Act(run, future))
        self._start_soon()
        return await future

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Tell committed changes to a callable, in order; give the function that ends it."""
        self._subscribers.append(subscriber)

        def unsubscribe() -> None:
            with suppress(ValueError):
                self._subscribers.remove(subscriber)

        return unsubscribe

    def settle_soon(self, group: Group) -> None:
        """Take a finished group; from the writer's thread."""
        # A loop that is gone has nobody left to tell; what was committed stays so.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._settle, group)

    async def drained(self) -> None:
        """Wait until every act that was accepted is settled."""
        await self._idle.wait()

    def _start_soon(self) -> None:
        if not self._is_busy:
            self._is_busy = True
            self._idle.clear()
            # Soon, not now: whoever else is ready to write in this turn of the loop joins the group.
            self._loop.call_soon(self._start)

    def _start(self) -> None:
        acts: list[Act] = []
        while self._waiting and len(acts) < GROUP_LIMIT:
            act = self._waiting.popleft()
            # A caller who gave up before the act began takes its act along.
            if not _future(act).cancelled():
                acts.append(act)
        if not acts:
            self._is_busy = False
            self._idle.set()
            return
        self._running = len(acts)
        group = Group(acts)
        self._submit(group)
        # Not a mistake: see the module's text.
        group.executed.acquire(timeout=HOLD_SECONDS)

    def _settle(self, group: Group) -> None:
        # Changes first: whoever awaits the result finds everything that follows from it already known.
        if group.changes:
            self.head = group.changes[-1].seq
            self._publish(group.changes)
        self._running = 0
        for act in group.acts:
            future = _future(act)
            if future.cancelled():
                continue
            if act.error is None:
                future.set_result(act.result)
            else:
                future.set_exception(_awaitable(act.error))
        self._is_busy = False
        if self._waiting:
            self._start_soon()
        else:
            self._idle.set()

    def _publish(self, changes: Sequence[Change]) -> None:
        for subscriber in tuple(self._subscribers):
            try:
                subscriber(changes)
            except Exception as error:  # noqa: BLE001  (a defect of one subscriber must not reach the others)
                self._loop.call_exception_handler({"message": "a subscriber of the store failed", "exception": error})


def _future(act: Act) -> asyncio.Future[Any]:
    assert isinstance(act.ticket, asyncio.Future)
    return act.ticket


def _awaitable(error: BaseException) -> BaseException:
    # A future refuses StopIteration: it would end whoever awaits it without a word.
    return RuntimeError("an act raised StopIteration") if isinstance(error, StopIteration) else error
