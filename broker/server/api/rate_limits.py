"""How often one address may ask for what is dear: SPIRE's limits, and SPIRE's way to keep them.

A call waits for its turn. It is refused at once when it asks for more than a whole second's worth, when its own deadline
would pass first, or when the wait would be longer than :data:`MAX_WAIT`. Callers on the admin socket are not limited.
"""

import asyncio
import ipaddress
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Self, cast

from broker._proto.service import Context
from broker.clock import Clock
from broker.errors import Unavailable
from broker.server.api.access import Caller, LocalPeer

ATTEST_PER_SECOND: Final = 1
SIGN_PER_SECOND: Final = 500
PUSH_KEY_PER_SECOND: Final = 500
POST_STATUS_PER_SECOND: Final = 10
MAX_WAIT: Final = 30.0
"""Seconds that a call waits at most: with more before it, its caller does better to come again."""
MAX_ADDRESSES: Final = 65_536
"""Addresses remembered, some ten MiB; the one that has not asked for longest is forgotten first."""
IPV6_PREFIX: Final = 64
"""Bits of an IPv6 address that count: whoever has one address of a network has all of them."""

Sleep = Callable[[float], Awaitable[None]]


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class RateLimiter:
    """A bucket per address, that holds one second's worth and fills with time."""

    def __init__(
        self, per_second: int, clock: Clock, *, what: str, sleep: Sleep = asyncio.sleep, most: int = MAX_ADDRESSES
    ) -> None:
        """``what``: the limited thing, for the refusal's text. ``most`` addresses are remembered."""
        self._rate = per_second
        self._clock = clock
        self._what = what
        self._sleep = sleep
        self._most = most
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        """How many addresses are remembered."""
        return len(self._buckets)

    async def take(self, caller: Caller, context: Context, count: int = 1) -> None:
        """Wait until ``count`` may pass; raises Unavailable (``rate_limited``)."""
        if isinstance(caller, LocalPeer):
            return
        if count > self._rate:
            raise self._refused(f"rate ({count}) exceeds burst size ({self._rate})")
        bucket = self._bucket(_network(caller.address))
        tokens = bucket.tokens - count
        wait = max(0.0, -tokens / self._rate)
        remaining = cast("float | None", context.time_remaining())  # None: the caller set no deadline
        if wait > MAX_WAIT or (remaining is not None and wait > remaining):
            raise self._refused(f"the turn would come in {wait:.1f} s, which is too late")
        bucket.tokens = tokens
        if wait:
            try:
                await self._sleep(wait)
            except asyncio.CancelledError:
                bucket.tokens += count  # who has gone does not hold up the others
                raise

    def _bucket(self, address: str) -> _Bucket:
        now = self._clock.monotonic()
        bucket = self._buckets.get(address)
        if bucket is None:
            bucket = self._buckets[address] = _Bucket(self._rate, now)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(address)
        bucket.tokens = min(float(self._rate), bucket.tokens + (now - bucket.at) * self._rate)
        bucket.at = now
        return bucket

    def _refused(self, why: str) -> Unavailable:
        return Unavailable(
            f"rejecting request due to {self._what} rate limiting: {why}",
            code="rate_limited",
            hint="come again later; behind a load balancer, which hides the addresses, set [server.ratelimit]",
        )


class Unlimited(RateLimiter):
    """Lets everybody pass."""

    async def take(self, caller: Caller, context: Context, count: int = 1) -> None:
        """Let it pass."""


@dataclass(frozen=True, slots=True)
class Limits:
    """One limiter per dear thing; calls that share one share its rate."""

    attest: RateLimiter
    certificates: RateLimiter
    """BatchNewX509SVID, RenewAgent, NewDownstreamX509CA."""
    tokens: RateLimiter
    """NewJWTSVID."""
    keys: RateLimiter
    """PublishJWTAuthority."""
    status: RateLimiter
    """PostStatus."""

    @classmethod
    def of(cls, clock: Clock, *, attestation: bool, signing: bool) -> Self:
        """Make SPIRE's limits; the two that the settings can switch off."""

        def limiter(per_second: int, what: str, *, on: bool = True) -> RateLimiter:
            return (RateLimiter if on else Unlimited)(per_second, clock, what=what)

        return cls(
            attest=limiter(ATTEST_PER_SECOND, "attest agent", on=attestation),
            certificates=limiter(SIGN_PER_SECOND, "certificate signing", on=signing),
            tokens=limiter(SIGN_PER_SECOND, "JWT signing request", on=signing),
            keys=limiter(PUSH_KEY_PER_SECOND, "publish authority"),
            status=limiter(POST_STATUS_PER_SECOND, "post status"),
        )


def _network(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address  # unknown: all of these share one bucket
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, IPV6_PREFIX), strict=False))
    return str(found)
