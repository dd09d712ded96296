"""An event loop whose time can run faster: what sleeps for a minute wakes after a second, what a kernel does takes as long as ever."""

import asyncio
import selectors
import time


class WarpedLoop(asyncio.SelectorEventLoop):
    """``factor`` seconds pass for each real one; it may be changed while the loop runs."""

    def __init__(self) -> None:
        self._factor = 1.0
        self._from_real = self._from_own = time.monotonic()
        super().__init__(_Selector(self))

    @property
    def factor(self) -> float:
        return self._factor

    @factor.setter
    def factor(self, factor: float) -> None:
        self._from_own, self._from_real = self.time(), time.monotonic()
        self._factor = factor

    def time(self) -> float:
        return self._from_own + (time.monotonic() - self._from_real) * self._factor


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]  # chosen by the platform
    def __init__(self, loop: WarpedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(None if timeout is None else timeout / self._loop.factor)
