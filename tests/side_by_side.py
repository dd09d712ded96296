"""The suite in two processes: which tests stay together, and which of them nothing may run beside.

``pytest --numprocesses 2`` needs only this. Whoever asks for fewer files, or for one process, sees pytest as it is.
"""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/conformance/", "tests/attacks/attestation/")
"""Their fixtures live as long as their package does; everywhere else a file is the longest that one lives."""


class ByFile(LoadScopeScheduling):
    """Gives each process whole files, and whole packages where they share what they start."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def unit_of(test: str) -> str:
    """Name what one process runs as a whole: the test's file, or its package."""
    return next((package for package in TOGETHER if test.startswith(package)), test.partition("::")[0])


class Room:
    """Where one test runs beside others, or one alone: a lock that the processes of a run share.

    Whoever waits to be alone holds the door, so that nobody who comes later goes first.
    """

    def __init__(self, directory: Path) -> None:
        self._door = directory / "door"
        self._room = directory / "room"

    @contextmanager
    def entered(self, *, alone: bool) -> Iterator[None]:
        """Be in the room; wait without a limit, since each test has its own."""
        with ExitStack() as until_the_end:
            with _locked(self._door, fcntl.LOCK_EX):
                until_the_end.enter_context(_locked(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
            yield


@contextmanager
def _locked(file: Path, how: int) -> Iterator[None]:
    with file.open("wb") as held:
        fcntl.flock(held, how)
        try:
            yield
        finally:
            # Said aloud: a process that the test forked may still hold the same open file.
            fcntl.flock(held, fcntl.LOCK_UN)


class Controller:
    """The hooks of the process that hands out the tests."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="brokertests")

    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["room"] = self._directory.name

    def pytest_xdist_make_scheduler(self, config: Any, log: Any) -> ByFile:
        return ByFile(config, log)

    def pytest_unconfigure(self) -> None:
        self._directory.cleanup()
