"""Proofs of possession at the token endpoint: nonces of ours, and each proof once, by every replica and after every restart.

A proof is spent in a commit of its own, before anything is granted on it: a request that fails has used its proof up. Who sends
none pays nothing for this.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

from broker.clock import Clock
from broker.server.store.ports import Store, Writer
from broker.spiffe import JwtSvid
from broker.spiffe.jose import b64url_encode
from broker.spiffe.jwtsvid import LEEWAY
from broker.tasks import Expected, NonceWanted, ShownProof, verify_proof

NONCE_EVERY: Final = timedelta(seconds=60)
"""How long one nonce is handed out: none is made, and nothing written, while nobody sends proofs."""
NONCE_LIFE: Final = timedelta(seconds=180)
"""How long a nonce is taken: a proof that was made ahead of its time is worth nothing after it."""
NONCE_BYTES: Final = 18
KNOWN_NONCES: Final = 8
"""Nonces of this process that are not looked up: it makes three in the life of one."""


class Proofs:
    """Verifies proofs for the token endpoint, and remembers them in the store."""

    def __init__(self, store: Store, clock: Clock, random: Callable[[int], bytes]) -> None:
        """``random`` gives that many random bytes."""
        self._store = store
        self._clock = clock
        self._random = random
        self._current: tuple[str, datetime] | None = None
        self._known: OrderedDict[str, datetime] = OrderedDict()

    def now(self) -> datetime:
        """Give the time by which proofs and assertions are judged."""
        return self._clock.now()

    async def nonce(self) -> str:
        """Give the nonce of this moment; it is in the store before it is handed out. Raises Unavailable."""
        now = self._clock.now()
        if self._current is None or not self._current[1] <= now < self._current[1] + NONCE_EVERY:
            nonce = b64url_encode(self._random(NONCE_BYTES))
            until = now + NONCE_LIFE
            await self._store.write(lambda writer: writer.add_nonce(nonce, until))
            self._current = nonce, now
            self._remember(nonce, until)
        return self._current[0]

    async def verify(self, headers: Sequence[str], expected: Expected) -> ShownProof:
        """Verify one proof, which is not spent yet; raises InvalidToken, or NonceWanted where it lacks a nonce of ours."""
        proof = verify_proof(headers, expected, now=self._clock.now())
        if not proof.nonce or not await self._is_ours(proof.nonce):
            raise NonceWanted(await self.nonce())
        return proof

    async def spend(self, proof: ShownProof, assertion: JwtSvid | None = None) -> None:
        """Use a proof up, and tie the JWT-SVID that came with it to its key; Refused where either was another's before."""

        def act(writer: Writer) -> None:
            writer.spend_proof(proof.id, proof.expires_at)
            if assertion is not None:
                # NOTE(security): a proof says nothing of the JWT-SVID beside it: whoever stole one would make a key of his own.
                writer.claim_assertion(_name(assertion), proof.jkt, assertion.expires_at + 2 * LEEWAY)

        await self._store.write(act)

    async def _is_ours(self, nonce: str) -> bool:
        now = self._clock.now()
        until = self._known.get(nonce)
        if until is not None:
            return now < until
        # Made by another replica, or before a restart.
        return await self._store.read(lambda reader: reader.knows_nonce(nonce, now))

    def _remember(self, nonce: str, until: datetime) -> None:
        self._known[nonce] = until
        if len(self._known) > KNOWN_NONCES:
            self._known.popitem(last=False)


def _name(assertion: JwtSvid) -> str:
    # Without the signature, which can be written in more than one way.
    signed = assertion.token.rsplit(".", 1)[0]
    return b64url_encode(hashlib.sha256(signed.encode()).digest())
