"""How much goes into one message: a number of items, and fewer where they are long."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeVar

from google.protobuf.message import Message

MAX_PAGE_BYTES: Final = 3 * 1024 * 1024
"""Of one page: three quarters of what gRPC lets pass, since neither end counts what is around the items."""

M = TypeVar("M", bound=Message)


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
