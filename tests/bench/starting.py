"""What a command costs before it does anything: credential helpers are started once per call."""

import subprocess
import sys
import time

from tests.bench.measure import Item, within

RUNS = 12
MILLISECONDS = 120.0
"""Of ``broker version`` (ARCHITECTURE: nouns are loaded when they are used)."""


def version() -> list[Item]:
    """Milliseconds of `broker version`, the best of some runs, beside an interpreter that does nothing."""
    bare = _best([sys.executable, "-c", "pass"])
    return [within("version", _best([sys.executable, "-m", "broker.cli.main", "version"]), "ms", bare, MILLISECONDS)]


def _best(command: list[str]) -> float:
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append((time.perf_counter() - began) * 1000)
    return min(times)
