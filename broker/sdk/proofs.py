"""DPoP from the service's side: its nonces, and each proof once (RFC 9449 §7, §9, §11.1).

Both are of this process: a proof that was made for another replica has another replica's nonce, and is asked for again. The
address that a proof must be for is the configured one; what Host or a proxy's headers say is not read.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from broker.clock import Clock
from broker.errors import Invalid, InvalidToken, Refused, Unavailable
from broker.tasks import Expected, NonceWanted, Resource, ShownProof, verify_proof

NONCE_SECONDS: Final = 60.0
"""How long one nonce is handed out; it is taken for as long again."""
NONCE_BYTES: Final = 18
MOST_PROOFS: Final = 100_000
"""Proofs remembered at once, some twenty megabytes: a thousand requests a second for as long as a proof is good."""


@dataclass(frozen=True, slots=True)
class DpopRequest:
    """What came with ``Authorization: DPoP``: every DPoP header's value, the method, and the path without the query."""

    headers: Sequence[str] = field(repr=False)
    method: str
    path: str


class ProofJudge:
    """Judges the proofs of one service."""

    def __init__(self, origin: str, clock: Clock) -> None:
        """``origin``: the service's own address as its callers write it; of a longer URI, scheme, host and port count."""
        parts = urlsplit(origin)
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._clock = clock
        self._seen: dict[str, float] = {}
        self._nonces = ("", "")
        self._renewed_at = -NONCE_SECONDS * 2

    @property
    def nonce(self) -> str:
        """The nonce to use from now on."""
        age = self._clock.monotonic() - self._renewed_at
        if age >= NONCE_SECONDS or not self._nonces[0]:
            before = self._nonces[0] if age < 2 * NONCE_SECONDS else ""
            self._nonces = secrets.token_urlsafe(NONCE_BYTES), before
            self._renewed_at = self._clock.monotonic()
        return self._nonces[0]

    def judge(self, request: DpopRequest, token: str) -> ShownProof:
        """Verify a proof for this token and request; it is not spent yet.

        Raises:
            InvalidToken: ``invalid_dpop_proof``.
            NonceWanted: it lacks a nonce of ours.
        """
        try:
            address = Resource(self._origin + request.path)
        except Invalid:
            raise InvalidToken("no proof can be for this address", code="invalid_dpop_proof") from None
        expected = Expected(request.method, address, token)
        return verify_proof(request.headers, expected, now=self._clock.now(), nonce=self._is_ours)

    def spend(self, proof: ShownProof) -> None:
        """Use a proof up, once everything else about its request holds.

        Raises:
            Refused: it was used before (``proof_replayed``).
            Unavailable: more proofs are remembered than this process can hold.
        """
        now = self._clock.now().timestamp()
        if self._seen.get(proof.id, 0) > now:
            raise Refused("the proof was used before", code="proof_replayed", hint="make a new proof for each request")
        if len(self._seen) >= MOST_PROOFS:
            self._seen = {name: until for name, until in self._seen.items() if until > now}
        if len(self._seen) >= MOST_PROOFS:
            raise Unavailable("too many proofs at once", code="dpop_busy", hint="try again in a moment")
        self._seen[proof.id] = proof.expires_at.timestamp()

    def _is_ours(self, nonce: str) -> bool:
        newest = self.nonce  # rotates first: what is over is not taken
        if not nonce or nonce not in self._nonces:
            raise NonceWanted(newest)
        return True
