"""Asks the server to sign, and believes nothing: every answer is verified against the key, the entry and the bundle.

X.509 requests go in batches: while one is under way the next gathers; an idle signer sends at once. Keys are made here
and never leave. Knows no sessions: who gets what is not decided here.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)

from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker.agent.cache import EstateCache
from broker.agent.holdings import JwtHolding, X509Holding
from broker.agent.upstream import RPC_TIMEOUT, Upstream, answered_once_more
from broker.clock import Clock
from broker.errors import BrokerError, InvalidSvid, NotFound, Refused, Unavailable
from broker.registry import Entry
from broker.spiffe import verify_jwt_svid, verify_x509_svid
from broker.spiffe.jose import parse_compact
from broker.telemetry.log import get_logger

MAX_BATCH: Final = 500  # SPIRE's own; an answer of 500 chains is under 1 MiB
MAX_BATCHES_UNDER_WAY: Final = 2
MAX_LIFETIME: Final = timedelta(days=366)  # a leaf for ten years is a fault or an attack, whoever signed it
TTL_SLACK: Final = timedelta(minutes=5)  # back-dating, and clocks that differ
HALF_LIFE: Final = 0.5
JITTER: Final = 0.1  # of the half-life: sessions of one batch do not all come back together

# google.rpc.Code of one result in a batch
_OK, _NOT_FOUND, _PERMISSION_DENIED = 0, 5, 7

_log = get_logger("agent.signing")


@dataclass(slots=True, eq=False)
class _Request:
    entry_id: str
    csr: bytes = field(repr=False)
    answer: "asyncio.Future[tuple[bytes, ...]]"


class Signing:
    """Signs through the server. One event loop only; :meth:`close` at the end."""

    def __init__(self, upstream: Upstream, cache: EstateCache, clock: Clock, chance: random.Random) -> None:
        self._upstream = upstream
        self._cache = cache
        self._clock = clock
        self._chance = chance
        self._waiting: list[_Request] = []
        self._under_way: set[asyncio.Task[None]] = set()
        self._scheduled = False
        self._is_closed = False

    async def x509(self, entry: Entry) -> X509Holding:
        """Give a new X.509-SVID with a new key; raises Unavailable (also for a bad answer), Refused or NotFound."""
        key = ec.generate_private_key(ec.SECP256R1())
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        chain = await self._submit(entry.id, csr.public_bytes(Encoding.DER))
        try:
            return self._x509_holding(entry, key, chain)
        except InvalidSvid as error:
            raise _unusable(entry, error) from error

    async def jwt(self, entry: Entry, audiences: Sequence[str], timeout: float = RPC_TIMEOUT) -> JwtHolding:  # noqa: ASYNC109 - gRPC's deadline
        """Give a new JWT-SVID for these audiences; raises as :meth:`x509`. ``timeout`` in seconds."""
        request = svid_pb2.NewJWTSVIDRequest(entry_id=entry.id, audience=audiences)
        response: svid_pb2.NewJWTSVIDResponse = await answered_once_more(
            lambda: self._upstream.svid.NewJWTSVID(request, timeout=timeout), self._upstream.lost
        )
        try:
            return self._jwt_holding(entry, audiences, response.svid.token)
        except InvalidSvid as error:
            raise _unusable(entry, error) from error

    def held(self, entry: Entry, chain: Sequence[bytes], key_der: bytes) -> X509Holding:
        """Judge an SVID that an earlier run was given, as strictly as a new one; raises InvalidSvid."""
        try:
            key = load_der_private_key(key_der, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise InvalidSvid("the key cannot be read", code="svid_wrong_key") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise InvalidSvid("the key is of another kind", code="svid_wrong_key")
        return self._x509_holding(entry, key, tuple(chain))

    async def close(self) -> None:
        """Give up what is under way, and what waits for its turn; nothing is sent any more."""
        self._is_closed = True
        _fail(self._waiting, Unavailable("the agent is stopping"))
        for task in list(self._under_way):
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _submit(self, entry_id: str, csr: bytes) -> tuple[bytes, ...]:
        request = _Request(entry_id, csr, asyncio.get_running_loop().create_future())
        if self._is_closed:
            raise Unavailable("the agent is stopping")
        self._waiting.append(request)
        self._schedule()
        return await request.answer

    def _schedule(self) -> None:
        # In the next turn of the loop: what comes in this turn goes together, and nobody waits on a timer.
        if (
            not self._is_closed
            and not self._scheduled
            and self._waiting
            and len(self._under_way) < MAX_BATCHES_UNDER_WAY
        ):
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        self._scheduled = False
        if self._is_closed:
            return
        batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
        task = asyncio.get_running_loop().create_task(self._send(batch), name="sign-batch")
        self._under_way.add(task)
        task.add_done_callback(self._sent)
        self._schedule()

    def _sent(self, task: "asyncio.Task[None]") -> None:
        self._under_way.discard(task)
        self._schedule()

    async def _send(self, batch: list[_Request]) -> None:
        request = svid_pb2.BatchNewX509SVIDRequest(
            params=[svid_pb2.NewX509SVIDParams(entry_id=one.entry_id, csr=one.csr) for one in batch]
        )
        try:
            response: svid_pb2.BatchNewX509SVIDResponse = await answered_once_more(
                lambda: self._upstream.svid.BatchNewX509SVID(request, timeout=RPC_TIMEOUT), self._upstream.lost
            )
            if len(response.results) != len(batch):
                raise Unavailable("the server answered another number of requests than were asked")
        except BrokerError as error:
            _fail(batch, error)
            return
        except asyncio.CancelledError:
            _fail(batch, Unavailable("the agent is stopping"))
            raise
        for one, result in zip(batch, response.results, strict=True):
            if one.answer.done():
                continue
            if result.status.code == _OK:
                one.answer.set_result(tuple(result.svid.cert_chain))
            else:
                one.answer.set_exception(_refusal(result.status.code, result.status.message))

    def _x509_holding(self, entry: Entry, key: ec.EllipticCurvePrivateKey, chain: tuple[bytes, ...]) -> X509Holding:
        now = self._clock.now()
        svid = verify_x509_svid(chain, self._cache.bundles, now=now)
        if svid.id != entry.spiffe_id:
            raise InvalidSvid("the server signed an SVID of another SPIFFE ID", code="svid_wrong_id")
        if _spki(svid.leaf.public_key()) != _spki(key.public_key()):
            raise InvalidSvid("the server signed another key", code="svid_wrong_key")
        longest = timedelta(seconds=entry.x509_svid_ttl) + TTL_SLACK if entry.x509_svid_ttl else MAX_LIFETIME
        if svid.not_after - now > longest:
            raise InvalidSvid("the server signed for too long", code="svid_too_long")
        return X509Holding(
            entry=entry,
            svid=svid,
            chain_der=b"".join(chain),
            key=key,
            key_der=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
            rotate_at=self._half_life(now, svid.expires_at),
        )

    def _jwt_holding(self, entry: Entry, audiences: Sequence[str], token: str) -> JwtHolding:
        now = self._clock.now()
        svid = verify_jwt_svid(token, self._cache.bundles, audience=audiences[0], now=now)
        if svid.id != entry.spiffe_id:
            raise InvalidSvid("the server signed a JWT-SVID of another SPIFFE ID", code="svid_wrong_id")
        if set(svid.audience) != set(audiences):
            raise InvalidSvid("the server signed for other audiences", code="svid_audience")
        if svid.expires_at - now > MAX_LIFETIME:
            raise InvalidSvid("the server signed for too long", code="svid_too_long")
        return JwtHolding(
            entry=entry,
            kid=parse_compact(token).kid or "",
            token=token,
            expires_at=svid.expires_at,
            renew_at=now + (svid.expires_at - now) * HALF_LIFE,
            issued_at=issued if isinstance(issued := svid.claims.get("iat"), int) else 0,
        )

    def _half_life(self, now: datetime, end: datetime) -> datetime:
        # From now on, not from not_before, which is back-dated: a short SVID would be past its half-life when it comes.
        return now + (end - now) * (HALF_LIFE * (1 + JITTER * (2 * self._chance.random() - 1)))


def _unusable(entry: Entry, error: InvalidSvid) -> Unavailable:
    _log.error("svid_unusable", entry=entry.id, code=error.reason, reason=error.message)
    return Unavailable(f"the server's answer is not a usable SVID: {error.message}", code=error.reason)


def _spki(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return b""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _refusal(code: int, message: str) -> BrokerError:
    if code == _NOT_FOUND:
        return NotFound(message or "the server knows no such entry", code="entry_not_found")
    if code == _PERMISSION_DENIED:
        return Refused(message or "the server refused to sign", code="svid_refused")
    return Unavailable(message or "the server could not sign", code="svid_not_signed")


def _fail(batch: list[_Request], error: BrokerError) -> None:
    for one in batch:
        if not one.answer.done():
            one.answer.set_exception(error)
