"""Named places where a fault test may stop, slow or break the server: ``BROKER_FAILPOINTS="name=exit|error|sleep:ms"``.

Honoured only where the setting ``allow_failpoints`` is on; a server that finds the variable without it does not start.
Without either, reaching a point costs one dictionary look-up.
"""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from broker.errors import Misconfigured, Unavailable

VARIABLE: Final = "BROKER_FAILPOINTS"
EXIT_STATUS: Final = 137
"""As after SIGKILL: the process ends as abruptly."""
MAX_SLEEP_MS: Final = 60_000
"""Longer than any deadline that a test could want to miss."""

_POINT: Final = re.compile(r"(?P<name>[a-z][a-z0-9_.]*)=(?P<act>exit|error|sleep:(?P<ms>[0-9]{1,5}))")


@dataclass(frozen=True, slots=True)
class _Point:
    act: str
    sleep_ms: int


_armed: dict[str, _Point] = {}


def arm(text: str, *, allowed: bool) -> None:
    """Set the points that a variable names, in place of all before; raises Misconfigured when it may not."""
    points = _parse(text)
    if points and not allowed:
        raise Misconfigured(
            f"{VARIABLE} is set, but failpoints are not allowed",
            code="failpoints_not_allowed",
            hint=f"unset {VARIABLE}, or set allow_failpoints = true under [server] on a test machine",
        )
    _armed.clear()
    _armed.update(points)


def reach(name: str) -> None:
    """Do what is armed at this place, if anything: end the process, raise Unavailable, or wait (it blocks)."""
    point = _armed.get(name)
    if point is None:
        return
    if point.act == "exit":
        os._exit(EXIT_STATUS)
    if point.act == "error":
        raise Unavailable(f"the failpoint {name} was reached", code="failpoint")
    time.sleep(point.sleep_ms / 1000)


def _parse(text: str) -> Mapping[str, _Point]:
    points: dict[str, _Point] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _POINT.fullmatch(item)
        if match is None or int(match["ms"] or 0) > MAX_SLEEP_MS:
            raise Misconfigured(
                f"{VARIABLE} holds an item that is not understood",
                code="failpoints_malformed",
                hint="write name=exit, name=error or name=sleep:MILLISECONDS, separated by commas",
            )
        points[match["name"]] = _Point(match["act"].partition(":")[0], int(match["ms"] or 0))
    return points
