"""How much goes into one message: a number of items, and fewer where they are long."""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

from google.protobuf.message import Message

MAX_PAGE_BYTES: Final = 3 * 1024 * 1024
"""Of one page: three quarters of what gRPC lets pass, since neither end counts what is around the items."""

M = TypeVar("M", bound=Message)
T = TypeVar("T")
R = TypeVar("R")


def pages(messages: Iterable[M], most: int) -> Iterator[tuple[Sequence[M], bool]]:
    """Give pages of at most ``most`` items and of bounded bytes, each with whether more follow; at least one page."""
    page: list[M] = []
    size = 0
    for message in messages:
        length = message.ByteSize()
        if page and (len(page) == most or size + length > MAX_PAGE_BYTES):
            yield page, True
            page, size = [], 0
        page.append(message)
        size += length
    yield page, False


async def in_parts(items: Sequence[T], most: int, act: Callable[[Sequence[T]], Awaitable[Sequence[R]]]) -> list[R]:
    """Do with a batch of any length what is done with at most ``most`` items at once; one outcome for each, in their order."""
    return [outcome for start in range(0, len(items), most) for outcome in await act(items[start : start + most])]
