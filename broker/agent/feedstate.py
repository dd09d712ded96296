"""The revocation feed, compact: of each thing that ended only the newest frame, and none that outlived its purpose.

Pure: no clock, no I/O. Frames lie in the order of their numbers, so whatever a listener has applied, what it lacks is
the tail.
"""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final

from broker._proto.broker.server.v1 import feed_pb2

FORGET_SLACK: Final = 120  # seconds: verifiers allow for clocks that differ
PAGE: Final = 5_000  # frames in one message: some 200 bytes each, far below gRPC's 4 MiB

_NAMED_BY: Final = {
    "subtree": "root",
    "task": "task",
    "session": "session",
    "token": "task",
    "user": "name",
    "agent": "name",
    "audience": "name",
}
"""Kind of a frame, and its field that says what ended."""

_Key = tuple[str, str]


@dataclass(slots=True)
class FeedState:
    """What a verifier must know, as of ``seq`` of ``store``. ``base`` is the number of the last whole snapshot."""

    store: str = ""
    seq: int = 0
    base: int = 0
    issuer: str = ""
    keys: str = ""
    audiences: tuple[feed_pb2.PublishedAudience, ...] = ()
    _frames: dict[_Key, feed_pb2.Frame] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._frames)

    def replace(self, store: str, seq: int, pages: list[feed_pb2.FeedSnapshot]) -> None:
        """Put a whole snapshot in the place of everything."""
        self.store, self.seq, self.base = store, seq, seq
        self.issuer, self.keys = pages[-1].issuer or pages[0].issuer, pages[-1].keys or pages[0].keys
        self.audiences = tuple(each for page in pages for each in page.audiences)
        self._frames = {}
        for page in pages:
            for frame in page.frames:
                self._file(frame)

    def apply(self, frame: feed_pb2.Frame) -> None:
        """Take one more frame; its number is above all before."""
        self.seq = max(self.seq, frame.seq)
        if frame.kind == "keys":
            self.keys = frame.keys
        self._file(frame)

    def forget(self, now: int) -> None:
        """Drop frames that no living token can meet any more; ``now`` in seconds since 1970."""
        for key in [key for key, frame in self._frames.items() if 0 < frame.forget_at < now - FORGET_SLACK]:
            del self._frames[key]

    def snapshot(self, about: AbstractSet[str] = frozenset()) -> Iterator[feed_pb2.FeedMessage]:
        """Write everything, or what is about these names, in pages."""
        frames = [frame for frame in self._frames.values() if concerns(frame, about)]
        starts = range(0, len(frames), PAGE) or (0,)
        for start in starts:
            page = feed_pb2.FeedSnapshot(
                issuer=self.issuer,
                keys=self.keys,
                frames=frames[start : start + PAGE],
                more=start + PAGE < len(frames),
                audiences=() if about else self.audiences,
            )
            yield feed_pb2.FeedMessage(seq=self.seq, store=self.store, snapshot=page)

    def after(self, seq: int) -> list[feed_pb2.FeedMessage]:
        """Write the frames above a number, in order."""
        tail: list[feed_pb2.Frame] = []
        for frame in reversed(self._frames.values()):
            if frame.seq <= seq:
                break
            tail.append(frame)
        return [feed_pb2.FeedMessage(seq=frame.seq, store=self.store, frame=frame) for frame in reversed(tail)]

    def _file(self, frame: feed_pb2.Frame) -> None:
        key = _key(frame)
        self._frames.pop(key, None)
        self._frames[key] = frame


def concerns(frame: feed_pb2.Frame, about: AbstractSet[str]) -> bool:
    """Say whether a frame is about one of these names; no names are all, and what is of everybody, or unknown here, is of each."""
    field_name = _NAMED_BY.get(frame.kind)
    return not about or field_name is None or getattr(frame, field_name) in about


def _key(frame: feed_pb2.Frame) -> _Key:
    match frame.kind:
        case "subtree":
            return "subtree", frame.root
        case "task":
            return "task", frame.task
        case "session":
            return "session", frame.session
        case "token":
            return "token", frame.jti
        case "keys":
            return "keys", ""
        case "user" | "agent" | "audience":
            # Each of them stands: which of two goes further is the verifier's to find.
            return frame.kind, str(frame.seq)
        case _:
            # Unknown to us is not unknown to every verifier: kept, and never merged with another.
            return frame.kind, str(frame.seq)
