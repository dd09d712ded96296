"""A clock that is stepped by hand."""

import datetime as dt
import time


class HandClock:
    """The machine's time, plus what the test added."""

    def __init__(self) -> None:
        self.step = dt.timedelta()

    def now(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC) + self.step

    def monotonic(self) -> float:
        return time.monotonic()
