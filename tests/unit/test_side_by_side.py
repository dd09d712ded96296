"""Tests that run in several processes: which stay together, and what it is to be alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.programs import wait_for
from tests.side_by_side import Room, unit_of


class Guest:
    """A thread that enters the room, and stays until it is told to go."""

    def __init__(self, room: Room, *, alone: bool) -> None:
        self.is_in, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._visit, args=(room, alone))
        self._thread.start()

    def _visit(self, room: Room, alone: bool) -> None:
        with room.entered(alone=alone):
            self.is_in.set()
            self._go.wait()

    def go(self) -> None:
        self._go.set()
        self._thread.join()


@contextmanager
def guest(room: Room, *, alone: bool = False) -> Iterator[Guest]:
    one = Guest(room, alone=alone)
    try:
        yield one
    finally:
        one.go()


def waiting(directory: Path) -> int:
    """How many wait for a lock on a file of this directory, as the kernel says."""
    inodes = {str(file.stat().st_ino) for file in directory.iterdir()}
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return sum(line[1] == "->" and line[6].rpartition(":")[2] in inodes for line in lines)


def test_who_need_not_be_alone_are_there_together(tmp_path: Path) -> None:
    room = Room(tmp_path)
    with guest(room) as one, guest(room) as other:
        wait_for(lambda: one.is_in.is_set() and other.is_in.is_set())


def test_who_must_be_alone_waits_for_others_and_others_for_them(tmp_path: Path) -> None:
    room = Room(tmp_path)
    with guest(room) as first:
        wait_for(first.is_in.is_set)
        with guest(room, alone=True) as alone:
            wait_for(lambda: waiting(tmp_path) == 1)
            with guest(room) as late:
                wait_for(lambda: waiting(tmp_path) == 2)
                # The latecomer does not go first, although the one who is there would not mind.
                assert not alone.is_in.is_set()
                assert not late.is_in.is_set()
                first.go()
                wait_for(alone.is_in.is_set)
                assert not late.is_in.is_set()
                alone.go()
                wait_for(late.is_in.is_set)


@pytest.mark.parametrize(
    ("test", "unit"),
    [
        ("tests/unit/test_clock.py::test_one[a::b]", "tests/unit/test_clock.py"),
        ("tests/contract/test_store_life.py::TestIt::test_one", "tests/contract/test_store_life.py"),
        ("tests/attacks/attestation/test_names.py::test_one", "tests/attacks/attestation/"),
        ("tests/conformance/test_bundles.py::test_one", "tests/conformance/"),
    ],
)
def test_what_stays_in_one_process(test: str, unit: str) -> None:
    assert unit_of(test) == unit
