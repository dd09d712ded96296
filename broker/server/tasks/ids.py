"""Names that we make: a prefix, the time, and 96 random bits, in hexadecimal, so that they sort by age.

Sorting by age keeps a database's index short of random writes; the random part is what nobody can guess.
"""

from datetime import datetime
from typing import Final, Protocol

RANDOM_BYTES: Final = 12
TIME_BYTES: Final = 6
"""Milliseconds since 1970 fit until the year 10889."""


class RandomBytes(Protocol):
    """Where randomness comes from: ``secrets.token_bytes`` but in tests."""

    def __call__(self, size: int, /) -> bytes:
        """Give this many random bytes."""
        ...


class Ids:
    """Makes names: ``tsk_…`` for tasks, ``jti_…`` for tokens, ``txn_…`` for exchanges."""

    def __init__(self, random: RandomBytes) -> None:
        self._random = random

    def new(self, prefix: str, now: datetime) -> str:
        """Make one name: the prefix, an underscore, and 36 hexadecimal digits."""
        time = int(now.timestamp() * 1000).to_bytes(TIME_BYTES)
        return f"{prefix}_{(time + self._random(RANDOM_BYTES)).hex()}"
