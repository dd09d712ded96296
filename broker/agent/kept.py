"""A state that is kept in a file: written in a thread, for a disk may take seconds and the event loop serves everybody.

The newest state wins, and what was forgotten does not come back, whatever was under way. What is kept is not known here.
"""

import asyncio
import threading
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
S_contra = TypeVar("S_contra", contravariant=True)


class StateFile(Protocol[S_contra]):
    """A file that holds one state, or is not there."""

    def store(self, state: S_contra, /) -> None:
        """Replace what is stored; on return it is on the disk. Raises OSError."""

    def remove(self) -> None:
        """Forget what is stored; harmless when there is nothing. Raises OSError."""


class Kept(Generic[T]):
    """Writes states of one kind, and forgets them."""

    def __init__(self, file: StateFile[T]) -> None:
        """Nobody else writes ``file``."""
        self._file = file
        self._busy = threading.Lock()
        self._said = 0  # counts what was asked for: states, and that there be none
        self._forgotten = 0  # the last time that there was to be none
        self._written = 0  # whose state is in the file

    async def save(self, state: T) -> None:
        """Write a state, unless a newer one was written before; on return it is on the disk. Raises OSError."""
        self._said += 1
        await asyncio.to_thread(self._store, state, self._said)

    def forget(self) -> None:
        """Leave nothing of before: at once, or as soon as a write that is under way has ended. Raises OSError."""
        self._said += 1
        self._forgotten = self._said
        if self._busy.acquire(blocking=False):
            try:
                self._file.remove()
            finally:
                self._busy.release()

    def _store(self, state: T, number: int) -> None:
        with self._busy:
            if number > max(self._written, self._forgotten):
                self._file.store(state)
                self._written = number
        # Forgotten meanwhile: by whoever could not have the file, because it was being written.
        if number < self._forgotten:
            with self._busy:
                if self._written < self._forgotten:
                    self._file.remove()
