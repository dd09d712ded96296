"""What a verifier pays for a task token: seen for the first time, and seen again."""

from collections.abc import MutableMapping
from datetime import timedelta
from typing import Any

import jwt

from broker.clock import SystemClock
from broker.spiffe import verify_x509_svid
from broker.tasks import Confirmation
from broker.transport.tls import SvidPeer
from tests.bench.measure import Item, at_most, time_per_call
from tests.unit.sdk.world import World, heartbeat, snapshot
from tests.unit.tasks.world import ISSUER, TICKETS, claims, delegation, task

TOKENS = 400
"""Tokens that are each seen for the first time, in one round."""
COLD_SHARE = 1.6
WARM_MICROSECONDS = 6.0


class Verifier:
    """A real verifier with a live feed, and a connection whose certificate it knows already."""

    def __init__(self, tokens: int) -> None:
        self.world = World()
        self.world.clock = self.world.verifier._clock = SystemClock()
        self.world.hear(snapshot(self.world.key))
        chain = self.world.identity.chain_der
        svid = verify_x509_svid(chain, self.world.workload.bundles, now=self.world.clock.now())
        self.connection: MutableMapping[str, Any] = {"extensions": {"broker.peer": SvidPeer(svid)}}
        now = self.world.clock.now()
        started = task(now=now, delegation=delegation(expires_at=now + timedelta(hours=2)))
        cnf = Confirmation(svid.x5t, "ws_1")
        self.tokens = [
            self.world.key.token(claims(started, now=now, cnf=cnf, jti=f"jti_{number}").to_payload())
            for number in range(tokens)
        ]

    def forget(self) -> None:
        """See every token for the first time again; hear that the feed lives."""
        self.world.hear(snapshot(self.world.key))
        self.world.verifier._keys_changed()

    def verify(self, token: str) -> None:
        self.world.verifier.verify_now(token, self.connection)


def verify_cold(*, tokens: int = TOKENS, rounds: int = 5) -> list[Item]:
    """Microseconds for a token that was never seen, against PyJWT with the same key and the same tokens."""
    verifier = Verifier(tokens)
    key = verifier.world.key.public[verifier.world.key.kid]
    ours, bare = [], []
    for _ in range(rounds):
        verifier.forget()
        each = iter(verifier.tokens)
        ours.append(time_per_call(lambda each=each: verifier.verify(next(each)), tokens) * 1e6)
        each = iter(verifier.tokens)
        bare.append(time_per_call(lambda each=each: _decode(next(each), key), tokens) * 1e6)
    return [at_most("verify_cold", min(ours), "us", min(bare), COLD_SHARE)]


def verify_warm(*, calls: int = 20_000, rounds: int = 5) -> list[Item]:
    """Microseconds for a token that was seen; the limit is a call that does nothing."""
    verifier = Verifier(1)
    (token,), verify, connection = verifier.tokens, verifier.world.verifier.verify_now, verifier.connection
    verifier.verify(token)
    ours, bare = [], []
    for _ in range(rounds):
        verifier.world.hear(heartbeat(2))
        ours.append(time_per_call(lambda: verify(token, connection), calls) * 1e6)
        bare.append(time_per_call(lambda: _nothing(token, connection), calls) * 1e6)
    value = min(ours)
    return [Item("verify_warm", value, "us", min(bare), f"<= {WARM_MICROSECONDS:g} us", value <= WARM_MICROSECONDS)]


def _decode(token: str, key: Any) -> None:
    jwt.decode(token, key, algorithms=["ES256"], audience=TICKETS.text, issuer=ISSUER)


def _nothing(token: str, connection: object) -> None:
    del token, connection
