"""Federation's rules: what a relationship is, where its endpoint may lead, and whether what was fetched is newer.

A trust domain, its endpoint's address and the endpoint's profile are given, never inferred from one another (SPIFFE
Federation §5.1). Knows no sockets, no store and no clock.
"""

import ipaddress
import re
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

from broker.errors import Invalid, Refused
from broker.spiffe.bundles import Bundle
from broker.spiffe.ids import SpiffeId, TrustDomain

MAX_URL: Final = 2048
"""Longest address of an endpoint, in bytes; longer ones are not addresses that people write."""
DEFAULT_REFRESH: Final = 300
"""Seconds between two looks at an endpoint whose bundle gives no hint (§3.2)."""
MIN_REFRESH: Final = 15
"""A hint below this would let the other side make this one a load on it."""
MAX_REFRESH: Final = 3600
"""A hint above this would leave an authority that was withdrawn there trusted here for longer than an hour."""

_GIVEN_OUT: Final = ipaddress.IPv6Network("2000::/3")
"""Of IPv6, all that is assigned to the world (RFC 4291 §2.4); ``ipaddress`` calls site-local addresses global."""
_TRANSLATED: Final = ipaddress.IPv6Network("64:ff9b::/96")
"""What a translator to IPv4 listens for (RFC 6052 §2.1)."""

_PLAIN: Final = re.compile(r"[\x21-\x7e]+")


class Profile(StrEnum):
    """How whoever serves the bundle is authenticated (§5.2)."""

    HTTPS_WEB = "https_web"
    HTTPS_SPIFFE = "https_spiffe"


@dataclass(frozen=True, slots=True)
class Relationship:
    """Where the bundle of a trust domain comes from. Raises Invalid; ``endpoint_id`` is for https_spiffe only."""

    trust_domain: TrustDomain
    url: str
    profile: Profile
    endpoint_id: SpiffeId | None = None

    def __post_init__(self) -> None:
        read_endpoint_url(self.url)
        if self.profile is Profile.HTTPS_SPIFFE and self.endpoint_id is None:
            raise Invalid("the SPIFFE ID of the bundle endpoint is missing", code="endpoint_spiffe_id_missing")
        if self.profile is Profile.HTTPS_WEB and self.endpoint_id is not None:
            raise Invalid("https_web knows no SPIFFE ID of the endpoint", code="endpoint_spiffe_id_unexpected")

    @property
    def is_self_serving(self) -> bool:
        """Tell whether the endpoint's identity is judged by the very bundle that it serves (§5.2.2)."""
        return self.endpoint_id is not None and self.endpoint_id.trust_domain == self.trust_domain


def read_endpoint_url(url: str) -> SplitResult:
    """Read the address of an endpoint: https, with a host, without user information; raises Invalid (§5.2)."""
    if not url:
        raise Invalid("bundle endpoint URL must use the https scheme", code="bundle_endpoint_url")
    if len(url) > MAX_URL or _PLAIN.fullmatch(url) is None:
        raise Invalid("failed to parse bundle endpoint URL", code="bundle_endpoint_url")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise Invalid("failed to parse bundle endpoint URL", code="bundle_endpoint_url") from None
    if parts.scheme != "https":
        raise Invalid("bundle endpoint URL must use the https scheme", code="bundle_endpoint_url")
    if not parts.hostname or port == 0:
        raise Invalid("bundle endpoint URL must specify the host", code="bundle_endpoint_url")
    if "@" in parts.netloc:
        raise Invalid("bundle endpoint URL must not contain user info", code="bundle_endpoint_url")
    if parts.fragment:
        raise Invalid("bundle endpoint URL must not contain a fragment", code="bundle_endpoint_url")
    return parts


def redirected(relationship: Relationship, here: str, location: str) -> str:
    """Give the address that a redirect from ``here`` leads to; raises Refused where it must not be followed (§5.3).

    The target is an endpoint's address itself. With https_spiffe it stays at the host and port that were configured.
    """
    target = urljoin(here, location)
    try:
        parts = read_endpoint_url(target)
    except Invalid as error:
        raise Refused(f"a redirect was not followed: {error.message}", code="redirect_refused") from None
    if relationship.profile is Profile.HTTPS_SPIFFE and _place(parts) != _place(urlsplit(relationship.url)):
        raise Refused("a redirect to another host was not followed", code="redirect_refused")
    return target


def is_reachable(relationship: Relationship, url: str, address: str) -> bool:
    """Tell whether a connection to ``address``, made for ``url``, may be used.

    Whoever configured a host knows where it is. Another host, which a redirect named, must not lead to this machine or
    into its network, whatever its name resolved to at this moment.
    """
    return urlsplit(url).hostname == urlsplit(relationship.url).hostname or is_public(address)


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the world's: not this machine, not a private network, not a cloud's metadata."""
    try:
        read = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(read, ipaddress.IPv6Address):
        inner = read.ipv4_mapped or read.sixtofour
        # NOTE(security): who translates or tunnels makes an IPv4 address of it, and that one is reached.
        if inner is None and read in _TRANSLATED:
            inner = ipaddress.IPv4Address(read.packed[-4:])
        return inner.is_global if inner else read in _GIVEN_OUT and read.is_global
    return read.is_global


class Freshness(Enum):
    """What a fetched bundle is to the one that is held."""

    SAME = auto()
    NEWER = auto()
    CHANGED = auto()
    """Other content under the same number: taken, but whoever publishes it breaks §4.1.1 of the bundle's standard."""
    OLDER = auto()
    """Not taken: it would bring back what has been withdrawn."""


def freshness(held: Bundle | None, fetched: Bundle) -> Freshness:
    """Compare by sequence number, and where there is none, let the latest win (§3.3)."""
    if held is None:
        return Freshness.NEWER
    before, now = held.sequence or 0, fetched.sequence or 0
    if before and now and now < before:
        return Freshness.OLDER
    if _content(held) == _content(fetched):
        return Freshness.SAME if before == now and held.refresh_hint == fetched.refresh_hint else Freshness.NEWER
    return Freshness.CHANGED if before and before == now else Freshness.NEWER


def refresh_seconds(bundle: Bundle | None) -> int:
    """Give the seconds until the next look: the bundle's own hint, within bounds (§3.2)."""
    hint = None if bundle is None else bundle.refresh_hint
    return min(max(hint or DEFAULT_REFRESH, MIN_REFRESH), MAX_REFRESH)


def _content(bundle: Bundle) -> Bundle:
    return replace(bundle, sequence=None, refresh_hint=None)


def _place(parts: SplitResult) -> tuple[str | None, int]:
    return parts.hostname, parts.port or 443
