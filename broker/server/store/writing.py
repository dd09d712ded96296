"""The event loop's side of writing: who waits, when a group starts, and who is told what after its COMMIT.

All of it runs on the event loop's thread; the statements and the COMMIT run on the writer's.

While a group's statements run on SQLite, the loop stands still, for at most ``HOLD_SECONDS``; during the COMMIT it goes on. The
reason is the interpreter's lock: the driver gives it away at every statement, and a busy loop hands it back only after the switch
interval, at best. Measured with a loop that never idles, 32 callers: p99 108 ms without the pause, 28 ms with it. The statements
need the same processor time either way, for they are memory work; the fsync is what the loop must not wait for. Statements that
wait for a network are waited for without a pause.

Many who come one after the other, through one connection say, would each have a COMMIT of their own, and each COMMIT costs as
much as several acts. So where several are at it, groups begin at least ``PACE_SECONDS`` apart; one who writes alone never waits.
Measured at the agents' door with 32 callers: groups of 5 in place of 1.6, and about a third more exchanges a second.
"""

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

from broker.errors import Unavailable
from broker.server.store.group import Act, Group
from broker.server.store.ports import Writer, makes_nothing_due
from broker.server.store.rows import Change

QUEUE_LIMIT: Final = 4_096
"""Acts that may wait: about a second of work. Whoever comes then is better told to try again than kept waiting."""
GROUP_LIMIT: Final = 64
"""Acts per COMMIT: enough to share its price, and some milliseconds of statements at most."""
HOLD_SECONDS: Final = 0.02
"""How long the loop stands still for one group: beyond it something is slow (a disk, a huge act), and others come first."""
PACE_SECONDS: Final = 0.004
"""From one group's beginning to the next one's, at least, while several write: a tenth of what an exchange may take."""
SEVERAL: Final = 4
"""Acts that wait or run at once, from which on others are to be expected."""
SEVERAL_SECONDS: Final = 0.1
"""How long others are expected after that."""

SWITCH_SECONDS: Final = 0.0005
"""How soon a busy event loop must hand the interpreter to a thread that waits, such as the writer after its COMMIT.

At Python's 5 ms, a loop that turns faster than that restarts the wait at each turn: COMMITs were seen to wait for seconds.
"""

T = TypeVar("T")
Subscriber = Callable[[Sequence[Change]], None]


class WriteQueue:
    """Acts that wait for the writer, gathered into groups, one group at a time."""

    def __init__(
        self,
        submit: Callable[[Group], None],
        loop: asyncio.AbstractEventLoop,
        *,
        hold: float = HOLD_SECONDS,
        pace: float = PACE_SECONDS,
    ) -> None:
        """Hand groups to ``submit``; be told of their end through :meth:`settle_soon`. ``hold``, ``pace``: see the module's text."""
        self._submit = submit
        self._loop = loop
        self._hold = hold
        self._pace = pace
        self._began = 0.0
        self._several_until = 0.0
        self._waiting: deque[Act] = deque()
        self._group: Group | None = None
        self._is_busy = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._subscribers: list[Subscriber] = []
        self.head = 0
        """The number of the last change that subscribers were told of."""
        self.written = 0
        """How many acts were taken, but for those that make nothing due."""

    async def put(self, run: Callable[[Writer], T]) -> T:
        """Run an act and give its result after its COMMIT; raises what it raised, or Unavailable."""
        running = 0 if self._group is None else len(self._group.acts)
        if len(self._waiting) + running >= QUEUE_LIMIT:
            raise Unavailable(
                f"{QUEUE_LIMIT} writes are waiting already", code="store_overloaded", hint="try again in a moment"
            )
        future: asyncio.Future[T] = self._loop.create_future()
        self._waiting.append(Act(run, future))
        if len(self._waiting) + running >= SEVERAL:
            self._several_until = self._loop.time() + SEVERAL_SECONDS
        if not makes_nothing_due(run):
            self.written += 1
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

    def take_in(self, changes: Sequence[Change]) -> None:
        """Tell subscribers of committed changes, except those that they know: another source may have been faster.

        Whoever calls begins at the head of some moment, so that there is never a gap.
        """
        news = changes if not changes or changes[0].seq > self.head else [c for c in changes if c.seq > self.head]
        if news:
            self.head = news[-1].seq
            self._publish(news)

    def give_up(self, error: Unavailable) -> None:
        """Tell all who wait that no answer will come in time. What has not begun never will; of the rest nobody knows."""
        for act in (*self._waiting, *(self._group.acts if self._group else ())):
            future = _future(act)
            if not future.done():
                future.set_exception(Unavailable(error.message, code=error.reason, hint=error.hint))

    async def drained(self) -> None:
        """Wait until every act that was accepted is settled."""
        await self._idle.wait()

    def _start_soon(self) -> None:
        if not self._is_busy:
            self._is_busy = True
            self._idle.clear()
            now = self._loop.time()
            due = self._began + self._pace
            if now < due and now < self._several_until and len(self._waiting) < GROUP_LIMIT:
                self._loop.call_at(due, self._start)
                return
            # Soon, not now: whoever else is ready to write in this turn of the loop joins the group.
            self._loop.call_soon(self._start)

    def _start(self) -> None:
        acts: list[Act] = []
        while self._waiting and len(acts) < GROUP_LIMIT:
            act = self._waiting.popleft()
            # A caller who gave up before the act began takes its act along.
            if not _future(act).done():
                acts.append(act)
        if not acts:
            self._is_busy = False
            self._idle.set()
            return
        group = self._group = Group(acts)
        self._began = self._loop.time()
        self._submit(group)
        if self._hold:
            # Not a mistake: see the module's text.
            group.executed.acquire(timeout=self._hold)

    def _settle(self, group: Group) -> None:
        # Changes first: whoever awaits the result finds everything that follows from it already known.
        self.take_in(group.changes)
        self._group = None
        for act in group.acts:
            future = _future(act)
            if future.done():
                continue
            if act.error is None:
                future.set_result(act.result)
            else:
                future.set_exception(awaitable(act.error))
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


@contextmanager
def short_turns() -> Iterator[None]:
    """Let threads that wait for the interpreter have it soon, for as long as the block lasts."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def awaitable(error: BaseException) -> BaseException:
    """Give what a future takes: it refuses StopIteration, which would end whoever awaits it without a word."""
    return RuntimeError("an act raised StopIteration") if isinstance(error, StopIteration) else error
