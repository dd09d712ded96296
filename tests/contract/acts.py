"""What the contract's tests share: how a store is opened, and acts that fail."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from broker.server.store.ports import Store, Writer

Opener = Callable[[], AbstractAsyncContextManager[Store]]


class BoomError(Exception):
    """What an act of a test raises."""


def failing(*steps: Callable[[Writer], object]) -> Callable[[Writer], None]:
    def act(w: Writer) -> None:
        for step in steps:
            step(w)
        raise BoomError

    return act
