"""The revocation feed: what has ended, pushed after its commit to whoever verifies tokens.

Invariants: a frame is pushed only after the commit that holds it; a subscriber first gets a whole snapshot and then every
frame after it, in order, or a new snapshot when it was too slow; it hears something with every heartbeat for as long as this
server knows all that has ended, so that silence means something. Which wire carries it is not known here.
"""

import asyncio
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from broker.clock import Clock
from broker.server.store.ports import Reader, Store, Writer
from broker.server.store.rows import Change, FrameRow, NewFrame
from broker.server.tasks.config import Audience
from broker.server.tasks.deliveries import Deliveries, Delivery
from broker.server.tasks.exchange import TaskKeys
from broker.server.tasks.lifecycle import FORGET_AFTER
from broker.spiffe.jose import PublicKey
from broker.tasks.keyset import write_keys
from broker.tasks.texts import ID, THUMBPRINT

HEARTBEAT_SECONDS: Final = 1.0
"""Silence at most: a verifier that misses three no longer believes."""
MAX_QUEUED: Final = 4096
"""Frames that wait for one slow subscriber: a second of the busiest server. Beyond it a snapshot costs less."""
SNAPSHOT_PAGE: Final = 2000
"""Frames in one message of a snapshot: some 600 KiB, well below the message limit of 4 MiB."""
SWEEP_EVERY: Final = 1024
"""Frames between two sweeps of what may be forgotten."""
FRAME_CHANGE: Final = "frame"
"""The change log's word for a frame; its body is the frame as JSON, its number the frame's."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A page of all that is dead; with ``more`` another page follows, and only the last one counts."""

    seq: int
    issuer: str
    keys: str
    frames: tuple[FrameRow, ...]
    more: bool
    bindings: tuple[tuple[str, frozenset[str]], ...] = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Nothing has happened, and this server is there to say so."""

    seq: int


Message: TypeAlias = Snapshot | FrameRow | Heartbeat


@dataclass(eq=False, slots=True)
class _Subscriber:
    queue: deque[FrameRow] = field(default_factory=deque)
    awake: asyncio.Event = field(default_factory=asyncio.Event)
    acked: int = 0
    needs_snapshot: bool = True


class Feed:
    """The frames of this moment, and everyone who listens."""

    def __init__(
        self,
        store: Store,
        keys: TaskKeys,
        clock: Clock,
        *,
        issuer: str,
        observe: Callable[[float], None] | None = None,
        heartbeat: float = HEARTBEAT_SECONDS,
        audiences: Iterable[Audience] = (),
    ) -> None:
        """``observe`` is told the seconds from commit to acknowledgement, of each frame and subscriber.

        ``audiences``: what each service's tokens may be bound to is published with every snapshot.
        """
        self._store = store
        self._keys = keys
        self._clock = clock
        self._issuer = issuer
        self._bindings = tuple((each.resource.text, each.binding) for each in audiences)
        self.heartbeat = heartbeat
        self._frames: dict[int, FrameRow] = {}
        self._ends: dict[str, int] = {}
        self._head = 0
        self._since_sweep = 0
        self._subscribers: set[_Subscriber] = set()
        self._stop: Callable[[], None] | None = None
        self.deliveries = Deliveries(observe)

    async def start(self) -> None:
        """Take in what is dead already, and follow the change log from there on."""
        self._stop = self._store.subscribe(self._committed)
        now = self._clock.now()

        def snapshot(reader: Reader) -> tuple[tuple[FrameRow, ...], int]:
            return reader.live_frames(now), reader.change_head()

        frames, head = await self._store.read(snapshot)
        for frame in frames:
            self._keep(frame)
        self._head = max(self._head, head)

    def stop(self) -> None:
        """Follow the change log no longer."""
        if self._stop is not None:
            self._stop()
            self._stop = None

    @property
    def store_id(self) -> str:
        """The store whose numbers the messages bear."""
        return self._store.id

    @property
    def is_current(self) -> bool:
        """Whether every end of a moment ago is known here, whichever server committed it."""
        return self._store.is_current

    @property
    def head(self) -> int:
        """The number of the last frame."""
        return self._head

    @property
    def subscribers(self) -> int:
        """How many listen now."""
        return len(self._subscribers)

    def frame_of(self, task_id: str) -> int:
        """Give the number of the frame that told of a task's end; 0 where there is none, or it is too long ago."""
        return self._ends.get(task_id, 0)

    def delivery(self, seq: int) -> Delivery:
        """Tell how far a frame has come."""
        return self.deliveries.of(seq)

    @contextmanager
    def subscribe(self) -> Iterator["Subscription"]:
        """Listen for as long as the block lasts."""
        subscriber = _Subscriber()
        self._subscribers.add(subscriber)
        try:
            yield Subscription(self, subscriber)
        finally:
            self._subscribers.discard(subscriber)
            self.deliveries.gone(subscriber)

    async def holds_leaf(self, session: str, x5t: str) -> bool:
        """Say whether a living workload session holds this leaf, or held it before a rotation; raises Unavailable."""
        if ID.fullmatch(session) is None or THUMBPRINT.fullmatch(x5t) is None:
            return False
        now = self._clock.now()
        return await self._store.read(lambda reader: reader.holds_leaf(session, x5t, now))

    # ---- what comes in

    def _committed(self, changes: Sequence[Change]) -> None:
        now = self._clock.monotonic()
        for change in changes:
            if change.kind != FRAME_CHANGE:
                continue
            frame = FrameRow(seq=change.seq, **json.loads(change.body))
            self._keep(frame)
            self._head = frame.seq
            self.deliveries.sent(frame.seq, self._subscribers, now)
            for subscriber in self._subscribers:
                self._queue(subscriber, frame)

    def _queue(self, subscriber: _Subscriber, frame: FrameRow) -> None:
        if not subscriber.needs_snapshot:
            subscriber.queue.append(frame)
            if len(subscriber.queue) > MAX_QUEUED:
                # Too slow: what it missed is in the next snapshot.
                subscriber.queue.clear()
                subscriber.needs_snapshot = True
        subscriber.awake.set()

    def _keep(self, frame: FrameRow) -> None:
        if frame.kind == "keys":
            # The snapshot says the keys of its own moment.
            return
        self._frames[frame.seq] = frame
        if frame.kind in ("subtree", "task"):
            self._ends[frame.task] = frame.seq
        self._since_sweep += 1
        if self._since_sweep >= SWEEP_EVERY:
            self._forget()

    def _forget(self) -> None:
        self._since_sweep = 0
        now = self._clock.now().timestamp()
        self._frames = {seq: frame for seq, frame in self._frames.items() if frame.forget_at > now}
        self._ends = {task: seq for task, seq in self._ends.items() if seq in self._frames}

    # ---- what goes out

    def snapshot(self) -> list[Snapshot]:
        """Give all that is dead at this moment, in pages."""
        self._forget()
        keys = write_keys(self._keys.task_keys())
        frames = sorted(self._frames.values(), key=lambda frame: frame.seq)
        pages = [tuple(frames[at : at + SNAPSHOT_PAGE]) for at in range(0, len(frames), SNAPSHOT_PAGE)] or [()]
        last = len(pages) - 1
        return [
            Snapshot(self._head, self._issuer, keys, page, number < last, () if number < last else self._bindings)
            for number, page in enumerate(pages)
        ]

    def acked(self, subscriber: _Subscriber, seq: int) -> None:
        """Note that a subscriber has applied every message up to ``seq``."""
        if subscriber.acked < seq <= self._head:
            self.deliveries.acked(subscriber, subscriber.acked, seq, self._clock.monotonic())
            subscriber.acked = seq


class Subscription:
    """One listener: an endless stream of messages, and the acknowledgements for them."""

    def __init__(self, feed: Feed, subscriber: _Subscriber) -> None:
        self._feed = feed
        self._subscriber = subscriber
        self._pages: deque[Snapshot] = deque()

    def __aiter__(self) -> "Subscription":
        """Give itself."""
        return self

    async def __anext__(self) -> Message:
        """Wait for the next message; a heartbeat when there is none for a while."""
        subscriber = self._subscriber
        if self._pages:
            return self._pages.popleft()
        if not subscriber.needs_snapshot and not subscriber.queue:
            subscriber.awake.clear()
            while not await self._woken():
                # Cut off from the store, nobody here knows what has ended: silence is then the truth.
                if self._feed.is_current:
                    return Heartbeat(self._feed.head)
        if subscriber.needs_snapshot:
            while not self._feed.is_current:  # noqa: ASYNC110  # nothing announces it
                await asyncio.sleep(self._feed.heartbeat)
            # From here on every frame is queued: nothing falls between the snapshot and the frames after it.
            subscriber.needs_snapshot = False
            subscriber.queue.clear()
            self._pages.extend(self._feed.snapshot())
            return self._pages.popleft()
        return subscriber.queue.popleft()

    async def _woken(self) -> bool:
        try:
            async with asyncio.timeout(self._feed.heartbeat):
                await self._subscriber.awake.wait()
        except TimeoutError:
            return False
        return True

    def ack(self, seq: int, store: str) -> None:
        """Note that every message up to ``seq`` was applied; another store's numbers mean nothing."""
        if store == self._feed.store_id:
            self._feed.acked(self._subscriber, seq)


def announce_keys(clock: Clock) -> Callable[[Writer, Mapping[str, PublicKey]], None]:
    """Give what the rotation of keys calls within its transaction: a frame with the new key set, before its first use."""

    def announce(writer: Writer, keys: Mapping[str, PublicKey]) -> None:
        now = clock.now()
        writer.add_frame(
            NewFrame(
                kind="keys",
                committed_at=int(now.timestamp() * 1000),
                forget_at=int(now.timestamp()) + FORGET_AFTER,
                keys=write_keys(keys),
            )
        )

    return announce
