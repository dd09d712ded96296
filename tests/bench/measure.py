"""What a measurement is: a value beside the limit of this very machine, taken in the same run, and the budget."""

import gc
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CPUCLOCK_SCHED = 2
"""Low bits of the kernel's clock id for all processor time of one process, in nanoseconds (clock_getcpuclockid(3))."""


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the result. ``limit`` is what the machine can do at all, ``ratio`` is value against limit."""

    name: str
    value: float
    unit: str
    limit: float | None
    budget: str
    met: bool

    @property
    def ratio(self) -> float | None:
        return None if not self.limit else self.value / self.limit

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "value": round(self.value, 3),
            "unit": self.unit,
            "limit": None if self.limit is None else round(self.limit, 3),
            "ratio": None if self.ratio is None else round(self.ratio, 3),
            "budget": self.budget,
            "met": self.met,
        }


def result(items: list[Item]) -> dict[str, object]:
    """Give the one document of a run."""
    return {"kind": "bench", "items": [item.to_json() for item in items]}


def at_least(name: str, value: float, unit: str, limit: float, share: float) -> Item:
    """Judge a rate by its share of the limit."""
    return Item(name, value, unit, limit, f">= {share:.0%} of the limit", value >= share * limit)


def at_most(name: str, value: float, unit: str, limit: float, times: float) -> Item:
    """Judge a time by that of the limit."""
    return Item(name, value, unit, limit, f"<= {times:g} x the limit", value <= times * limit)


def within(name: str, value: float, unit: str, limit: float, most: float) -> Item:
    """Judge a time by a fixed bound, in the same unit; the limit is for comparison."""
    return Item(name, value, unit, limit, f"< {most:g} {unit}", value < most)


def time_per_call(work: Callable[[], object], calls: int, *, clock: Callable[[], float] = time.thread_time) -> float:
    """Seconds that one call takes, on average over a tight loop; of this thread's processor time, unless told otherwise."""
    gc.collect()
    start = clock()
    for _ in range(calls):
        work()
    return (clock() - start) / calls


def rate(work: Callable[[], object], *, seconds: float) -> float:
    """Calls in a second of processor time of this process."""
    gc.collect()
    count, start, until = 0, time.process_time(), time.perf_counter() + seconds
    while time.perf_counter() < until:
        work()
        count += 1
    return count / (time.process_time() - start)


@contextmanager
def commits(path: Path) -> Iterator[Callable[[], None]]:
    """Give what commits one row durably, in a database of its own with the store's settings (WAL, ``synchronous=FULL``)."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, body BLOB)")
        body = b"a" * 1000
        yield lambda: connection.execute("INSERT INTO rows (body) VALUES (?)", (body,)).close()
    finally:
        connection.close()


def cpu_seconds(pid: int) -> float:
    """Processor time that all threads of a process have used."""
    return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]
