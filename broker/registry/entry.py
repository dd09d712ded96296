"""A registration entry: which SPIFFE ID a workload may hold, under which parent, and for which selectors.

Responsible for what makes one entry valid by itself. Which entries there are, who may write them and where they are
kept is not known here. Fields and meanings are SPIRE's (``spire.api.types.Entry``), then ours.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Self

from broker.errors import Invalid
from broker.registry.dns_names import checked_dns_names
from broker.spiffe import Selector, SpiffeId, TrustDomain

SERVER_PATH: Final = "/spire/server"
"""An entry under this parent names a set of nodes by their selectors (a node alias), not a workload."""

MAX_ID: Final = 255
"""Longest entry id, in characters, as in SPIRE."""
MAX_SELECTORS: Final = 128
"""Most selectors of one entry: a container has some dozens; each is compared at every connection."""
MAX_TTL: Final = 2**31 - 1
"""Largest lifetime, in seconds: the wire's int32. The server clamps it to its authority."""
MAX_HINT: Final = 1024
"""Longest hint, in UTF-8 bytes (SPIFFE Workload API §5.2.1)."""
MAX_FEDERATES_WITH: Final = 256
"""Most foreign trust domains: each brings a whole bundle to the workload."""
MAX_AUDIENCES: Final = 64
"""Most JWT-SVID audiences of one entry."""
MAX_TEXT: Final = 1024
"""Longest description, owner or audience, in UTF-8 bytes."""

_ID: Final = re.compile(r"[A-Za-z0-9._-]+")
_TEXT: Final = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*")


class Unstorable(Invalid):
    """SPIRE's wire lets it pass, and its store does not: the words say so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One registration entry; an instance that exists is valid by itself. Raises Invalid (code ``invalid_entry``).

    Lifetimes are in seconds, 0 meaning the server's default. DNS names are kept in lower case, in their order.
    """

    id: str
    spiffe_id: SpiffeId
    parent_id: SpiffeId
    selectors: frozenset[Selector]
    created_at: datetime
    x509_svid_ttl: int = 0
    jwt_svid_ttl: int = 0
    federates_with: frozenset[TrustDomain] = frozenset()
    admin: bool = False
    downstream: bool = False
    expires_at: datetime | None = None
    dns_names: tuple[str, ...] = ()
    revision: int = 0
    store_svid: bool = False
    hint: str = ""
    allowed_audiences: frozenset[str] = frozenset()
    may_start_tasks: bool = False
    description: str = ""
    owner: str = ""
    disable_x509_svid_prefetch: bool = False
    jwt_svid_include_jti: bool = False

    def __post_init__(self) -> None:
        if len(self.id) > MAX_ID:
            raise _unstorable("entry ID too long")
        if _ID.fullmatch(self.id) is None:
            raise _unstorable("entry ID contains invalid characters", "letters, digits, dots, dashes and underscores")
        self._check_ids()
        self._check_selectors()
        self._check_numbers()
        self._check_federation()
        try:
            object.__setattr__(self, "dns_names", checked_dns_names(self.dns_names))
        except Invalid as error:
            raise Invalid(f"invalid DNS name: {error.message}", code="invalid_entry", hint=error.hint) from None
        if len(self.hint.encode("utf-8", "replace")) > MAX_HINT:
            raise Invalid(f"hint is too long, max length is {MAX_HINT} characters", code="invalid_entry")
        for name, text, limit in (
            ("hint", self.hint, MAX_HINT),
            ("description", self.description, MAX_TEXT),
            ("owner", self.owner, MAX_TEXT),
            *(("audience", audience, MAX_TEXT) for audience in self.allowed_audiences),
        ):
            _check_text(name, text, limit)

    def validated(self, trust_domain: TrustDomain) -> Self:
        """Give the entry itself if the server may write it: it lies in its trust domain, and SPIRE's rules for a store hold.

        Raises Invalid.
        """
        if not self.spiffe_id.is_member_of(trust_domain):
            raise _invalid("its SPIFFE ID is not in the server's trust domain", hint=f"use spiffe://{trust_domain}/…")
        if self.store_svid and len({selector.type for selector in self.selectors}) > 1:
            raise _unstorable("selector types must be the same when store SVID is enabled")
        if self.store_svid and self.disable_x509_svid_prefetch:
            raise _invalid("an SVID that goes to a store is always fetched beforehand")
        return self

    @property
    def is_alias(self) -> bool:
        """Tell whether the entry names nodes by their selectors: its parent is the server."""
        return self.parent_id.path == SERVER_PATH

    @property
    def age_key(self) -> tuple[datetime, str]:
        """The order in which entries are served: oldest first, then by id, so that it never changes."""
        return self.created_at, self.id

    def is_expired(self, now: datetime) -> bool:
        """Tell whether the entry's own time is over. At ``expires_at`` itself it is."""
        return self.expires_at is not None and now >= self.expires_at

    def _check_ids(self) -> None:
        if self.spiffe_id.trust_domain != self.parent_id.trust_domain:
            raise _invalid("its SPIFFE ID and its parent are in different trust domains")
        if not self.spiffe_id.path or not self.parent_id.path:
            raise _invalid("its SPIFFE ID or its parent has no path")
        if self.spiffe_id.path == "/spire" or self.spiffe_id.path.startswith("/spire/"):
            # NOTE(security): an agent's or the server's own ID must never be issued to a workload.
            raise _invalid("its SPIFFE ID is reserved", hint="IDs under /spire belong to the server and its agents")

    def _check_selectors(self) -> None:
        if not self.selectors:
            # The empty set is part of every set: such an entry would match every process.
            raise _invalid("it has no selectors", hint="an entry without selectors would match everybody")
        if len(self.selectors) > MAX_SELECTORS:
            raise _invalid(f"it has more than {MAX_SELECTORS} selectors")

    def _check_numbers(self) -> None:
        for name, seconds in (("X509SvidTtl", self.x509_svid_ttl), ("JwtSvidTtl", self.jwt_svid_ttl)):
            if not 0 <= seconds <= MAX_TTL:
                raise _unstorable(f"{name} is not set", f"a lifetime lies between 0 and {MAX_TTL} seconds")
        if self.revision < 0:
            raise _invalid("its revision is negative")
        if self.created_at.tzinfo is None or (self.expires_at is not None and self.expires_at.tzinfo is None):
            raise _invalid("one of its times has no time zone")

    def _check_federation(self) -> None:
        if len(self.federates_with) > MAX_FEDERATES_WITH:
            raise _invalid(f"it federates with more than {MAX_FEDERATES_WITH} trust domains")
        if self.spiffe_id.trust_domain in self.federates_with:
            raise _invalid("it federates with its own trust domain")
        if len(self.allowed_audiences) > MAX_AUDIENCES or "" in self.allowed_audiences:
            raise _invalid(f"it has an empty audience, or more than {MAX_AUDIENCES}")


def _check_text(name: str, text: str, limit: int) -> None:
    if _TEXT.fullmatch(text) is None:
        raise _invalid(f"its {name} holds a control character or is not Unicode text")
    if len(text.encode()) > limit:
        raise _invalid(f"its {name} is longer than {limit} bytes")


def _unstorable(what: str, hint: str = "") -> Unstorable:
    return Unstorable(f"invalid registration entry: {what}", code="invalid_entry", hint=hint)


def _invalid(what: str, hint: str = "") -> Invalid:
    return Invalid(f"the entry is not valid: {what}", code="invalid_entry", hint=hint)
