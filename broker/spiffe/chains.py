"""Path validation: from a leaf, over the certificates that came with it, to an authority we trust (RFC 5280 §6).

Knows certificates and their order; of SPIFFE it knows nothing. The intermediates may come in any order, as TLS peers
send them. The search is bounded, so that no chain costs more than some milliseconds.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from broker.errors import InvalidSvid
from broker.spiffe import nameconstraints
from broker.spiffe.certificates import Authority, Facts, read_authority

MAX_CHAIN: Final = 8
"""Most certificates that a peer may present, the leaf included: nested trust domains use three or four."""
MAX_SIGNATURES: Final = 32
"""Most signatures checked in one search: a simple chain needs one for each of its certificates."""
_REMEMBERED: Final = 256
"""Proven pairs of intermediate and anchor: they are the same at every handshake, and a signature does not expire.
Only what an anchor has signed is remembered, so that no stranger can fill the memory."""


class TrustAnchors:
    """The authorities of one bundle, prepared for searching. Certificates that may not sign are left out."""

    __slots__ = ("_anchors", "_by_key_id")

    def __init__(self, certificates: Iterable[x509.Certificate]) -> None:
        anchors: list[Authority] = []
        for certificate in certificates:
            try:
                anchors.append(read_authority(certificate, anchor=True))
            except InvalidSvid:
                # One odd certificate must not make the others useless. It never counts as an anchor.
                continue
        self._anchors = tuple(anchors)
        self._by_key_id = {anchor.facts.key_id: anchor for anchor in anchors if anchor.facts.key_id is not None}

    def candidates(self, child: Facts) -> Iterator[Authority]:
        """Give the anchors, first the one whose key identifier the child names (RFC 5280 §4.2.1.1: a hint only)."""
        named = None if child.issuer_key_id is None else self._by_key_id.get(child.issuer_key_id)
        if named is not None:
            yield named
        for anchor in self._anchors:
            if anchor is not named:
                yield anchor


def find_path(
    leaf: Facts, intermediates: Sequence[Authority], anchors: TrustAnchors, *, now: datetime
) -> tuple[x509.Certificate, ...]:
    """Find the path from the leaf to an anchor, both included; raises InvalidSvid if there is none."""
    leaf.check_time(now)
    search = _Search(leaf, intermediates, anchors, now)
    path = search.extend(leaf, ())
    if path is None:
        raise search.refusal or InvalidSvid(
            "no authority of the trust domain vouches for the chain",
            code="svid_untrusted",
            hint="is the bundle of the leaf's own trust domain up to date, and are all intermediates sent?",
        )
    return (leaf.certificate, *(authority.facts.certificate for authority in path))


class _Search:
    """One depth-first search with a budget, remembering the first telling refusal."""

    __slots__ = ("_anchors", "_intermediates", "_leaf", "_now", "_signatures", "refusal")

    def __init__(self, leaf: Facts, intermediates: Sequence[Authority], anchors: TrustAnchors, now: datetime) -> None:
        self._leaf, self._intermediates, self._anchors, self._now = leaf, intermediates, anchors, now
        self._signatures = MAX_SIGNATURES
        self.refusal: InvalidSvid | None = None

    def extend(self, child: Facts, below: tuple[Authority, ...]) -> tuple[Authority, ...] | None:
        """Go one certificate up: to an anchor if possible, else over an intermediate not used yet."""
        for anchor in self._anchors.candidates(child):
            if self._issued(child, anchor, by_anchor=True) and self._fits(anchor, below):
                return (*below, anchor)
        for authority in self._intermediates:
            if any(authority is used for used in below):
                continue
            if self._issued(child, authority, by_anchor=False) and self._fits(authority, below):
                path = self.extend(authority.facts, (*below, authority))
                if path is not None:
                    return path
        return None

    def _issued(self, child: Facts, issuer: Authority, *, by_anchor: bool) -> bool:
        try:
            if by_anchor and child is not self._leaf:
                _prove(child.certificate, issuer.facts.certificate)
            else:
                child.certificate.verify_directly_issued_by(issuer.facts.certificate)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            # Another name, or a key that does not fit the signature's algorithm: this cost nothing.
            return False
        except InvalidSignature:
            self._spend()
            return False
        self._spend()
        return True

    def _spend(self) -> None:
        # Successes count too: certificates that all vouch for each other make factorially many paths.
        if self._signatures == 0:
            raise InvalidSvid("the chain has too many possible paths", code="svid_untrusted")
        self._signatures -= 1

    def _fits(self, issuer: Authority, below: tuple[Authority, ...]) -> bool:
        try:
            issuer.facts.check_time(self._now)
            _check_length(issuer.facts.path_length, below)
            self._check_names(issuer.facts.constraints, below)
        except InvalidSvid as refusal:
            self.refusal = self.refusal or refusal
            return False
        return True

    def _check_names(self, constraints: x509.NameConstraints | None, below: tuple[Authority, ...]) -> None:
        if constraints is None:
            return
        bound = [self._leaf, *(authority.facts for authority in below if not authority.self_issued)]
        for facts in bound:
            nameconstraints.check(constraints, facts.names, facts.subject())


def _check_length(limit: int | None, below: tuple[Authority, ...]) -> None:
    # Self-issued certificates do not count (RFC 5280 §4.2.1.9).
    if limit is not None and sum(not authority.self_issued for authority in below) > limit:
        raise InvalidSvid("the chain is longer than an authority allows", code="svid_path_length")


@lru_cache(maxsize=_REMEMBERED)
def _prove(child: x509.Certificate, issuer: x509.Certificate) -> None:
    # Failures raise, and what raises is not remembered.
    child.verify_directly_issued_by(issuer)
