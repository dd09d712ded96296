"""Refusals are shown until there are too many."""

import pytest

from broker.agent.refusal_log import LINES, PERIOD, RefusalLog
from broker.clock import SystemClock


class Clock(SystemClock):
    time = 0.0

    def monotonic(self) -> float:
        return self.time


class Log:
    def __init__(self) -> None:
        self.lines = []

    def info(self, event, **fields) -> None:
        self.lines.append((event, fields))


@pytest.mark.bears("W12")
def test_lines_are_bounded_and_the_rest_is_counted() -> None:
    log, clock = Log(), Clock()
    refused = RefusalLog(log, clock)
    for number in range(LINES + 5):
        refused("call_refused", pid=number)
    assert len(log.lines) == LINES
    clock.time = PERIOD
    refused("call_refused", pid=0)
    assert log.lines[LINES:] == [("refusals_not_shown", {"count": 5}), ("call_refused", {"pid": 0})]
