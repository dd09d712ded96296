"""Frames of the revocation feed. A frame's number is its change's, so that one order covers both."""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from dataclasses import asdict, fields
from datetime import datetime
from typing import Final

from broker.server.store.rows import FrameRow, NewFrame
from broker.server.store.sql import Row, SqlTables
from broker.server.store.tables.trail import TrailWriting
from broker.spiffe import strictjson

KIND: Final = "frame"
"""The kind of change that a frame is."""

_NAMES: Final = tuple(field.name for field in fields(NewFrame))
_COLUMNS: Final = ", ".join(("seq", *_NAMES))
_SINCE: Final = f"SELECT {_COLUMNS} FROM frames WHERE seq > ? ORDER BY seq"
_LIVE: Final = f"SELECT {_COLUMNS} FROM frames WHERE forget_at > ? ORDER BY seq"
_ADD: Final = f"INSERT INTO frames ({_COLUMNS}) VALUES (?{', ?' * len(_NAMES)})"


class FrameReading(SqlTables):
    """Reads frames."""

    def frames_since(self, seq: int) -> tuple[FrameRow, ...]:
        """Give all kept frames after a number, in order."""
        return tuple(_read(row) for row in self._sql.rows(_SINCE, (seq,)))

    def live_frames(self, now: datetime) -> tuple[FrameRow, ...]:
        """Give all frames that a living token may still meet, in order."""
        return tuple(_read(row) for row in self._sql.rows(_LIVE, (int(now.timestamp()),)))


class FrameWriting(FrameReading, TrailWriting):
    """Writes frames."""

    def add_frame(self, frame: NewFrame) -> int:
        """Append a frame and its change; give their one number."""
        body = strictjson.canonical(asdict(frame)).decode()
        seq = self.change(KIND, frame.root or frame.task or frame.session or frame.jti or frame.name, body)
        self._sql.run(_ADD, (seq, *(getattr(frame, name) for name in _NAMES)))
        return seq


def _read(row: Row) -> FrameRow:
    return FrameRow(seq=row[0], **dict(zip(_NAMES, row[1:], strict=True)))
