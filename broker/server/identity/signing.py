"""SVIDs: who may have which, written down, then signed.

An agent gets SVIDs only for entries it may serve, an operator mints what it likes short of the server's and the agents'
own IDs. Each signature is recorded in a committed transaction before it leaves; a batch is one transaction.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, TypeVar

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.clock import Clock
from broker.errors import BrokerError, Invalid, NotFound, PolicyDenied
from broker.registry.entry import MAX_TEXT, Entry
from broker.server.authority import profile
from broker.server.authority.authorities import Authorities
from broker.server.authority.csr import Wishes, requested_key
from broker.server.authority.jwt import ISSUED_BEFORE, JwtSvidClaims, sign_jwt_svid
from broker.server.authority.profile import Leaf, PublicKey
from broker.server.authority.x509 import X509Authority
from broker.server.identity.directory import Directory
from broker.server.store.ports import Store, Writer
from broker.server.store.revocation_rows import IssuedSvid
from broker.spiffe import SpiffeId, TrustDomain
from broker.telemetry.log import get_logger

T = TypeVar("T")

MAX_BATCH: Final = 500
"""Certificate requests in one batch: SPIRE's agent sends as many."""
INLINE: Final = 4
"""Up to so many requests are worked on where they arrive: a hop to a thread costs as much as one signature."""
MAX_AUDIENCES: Final = 16
"""Audiences of one JWT-SVID; the standard recommends one."""
ROUNDING: Final = timedelta(seconds=1)
"""By so much less an SVID lives because its times are whole seconds."""
TOKEN_ID_BYTES: Final = 16
"""Random bytes of a ``jti``."""
ANY_AUDIENCE: Final = "*"
"""In the default audiences: whatever the workload asks for."""

log = get_logger("signing")


@dataclass(frozen=True, slots=True)
class X509Request:
    """What an agent asks for: an entry, and the key to certify, as a PKCS#10 request."""

    entry_id: str
    csr_der: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SignedX509:
    """A signed X.509-SVID; the chain has the leaf first and no root."""

    spiffe_id: SpiffeId
    chain_der: tuple[bytes, ...] = field(repr=False)
    expires_at: datetime
    hint: str = ""


@dataclass(frozen=True, slots=True)
class SignedJwt:
    """A signed JWT-SVID."""

    spiffe_id: SpiffeId
    token: str = field(repr=False)
    issued_at: datetime
    expires_at: datetime
    hint: str = ""


@dataclass(frozen=True, slots=True)
class SigningRules:
    """Lives and audiences where an entry says nothing."""

    trust_domain: TrustDomain
    issuer: str
    x509_ttl: timedelta
    jwt_ttl: timedelta
    default_audiences: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Decided:
    """A leaf that is decided, not written down and not signed yet."""

    authority: X509Authority
    leaf: Leaf
    key: PublicKey = field(repr=False)
    entry_id: str
    hint: str

    def sign(self) -> SignedX509:
        chain = self.authority.issue(self.leaf, self.key)
        return SignedX509(self.leaf.spiffe_id, chain, self.leaf.validity.not_after, self.hint)

    def issued(self, agent: str) -> IssuedSvid:
        """What is kept of it, so that it can be revoked."""
        leaf = self.leaf
        end = leaf.validity.not_after
        return IssuedSvid(self.authority.id, f"{leaf.serial:x}", leaf.spiffe_id, self.entry_id, agent, end)


class Signing:
    """The use cases of SVIDs."""

    def __init__(
        self,
        store: Store,
        directory: Directory,
        authorities: Authorities,
        clock: Clock,
        *,
        rules: SigningRules,
        workers: Executor,
        count: Callable[[str, int], None] = lambda _kind, _signed: None,
    ) -> None:
        """``workers`` runs what takes the CPU for longer than a moment; ``count`` is told (kind, how many) of signatures."""
        self._store = store
        self._directory = directory
        self._authorities = authorities
        self._clock = clock
        self._rules = rules
        self._workers = workers
        self._count = count
        self._told: dict[
            str, str
        ] = {}  # by kind: the authority of which it was said that it ends before what it signs would

    @property
    def trust_domain(self) -> TrustDomain:
        """Where every SVID's SPIFFE ID lies."""
        return self._rules.trust_domain

    async def x509(self, agent: SpiffeId, requests: Sequence[X509Request]) -> list[SignedX509 | BrokerError]:
        """Sign for an agent, each request with its own outcome; raises Invalid for too many, Unavailable for none at all."""
        if len(requests) > MAX_BATCH:
            raise Invalid(f"a batch has at most {MAX_BATCH} requests", code="batch_too_large")
        authority, now = self._authorities.x509(), self._clock.now()
        entries = [self._directory.authorized_entry(agent, request.entry_id) for request in requests]

        def decide() -> list[_Decided | BrokerError]:
            return [
                self._decide(authority, entry, request.csr_der, now)
                for entry, request in zip(entries, requests, strict=True)
            ]

        outcomes = await self._work(decide, len(requests))
        decided = [outcome for outcome in outcomes if isinstance(outcome, _Decided)]
        if not decided:
            return [outcome for outcome in outcomes if isinstance(outcome, BrokerError)]
        records = [_x509_record(one, str(agent), now) for one in decided]
        # The signatures are made while the records are on their way to the disk, and kept back until they are there.
        signed, _ = await asyncio.gather(
            self._work(lambda: [one.sign() for one in decided], len(decided)),
            self._store.write(_recorder(records, [one.issued(str(agent)) for one in decided])),
        )
        self._count("x509", len(signed))
        ready = iter(signed)
        return [outcome if isinstance(outcome, BrokerError) else next(ready) for outcome in outcomes]

    async def jwt(self, agent: SpiffeId, entry_id: str, audience: Sequence[str]) -> SignedJwt:
        """Sign a JWT-SVID for an agent's workload; raises NotFound, PolicyDenied (``audience_denied``), Invalid."""
        entry = self._directory.authorized_entry(agent, entry_id)
        if entry is None:
            raise _not_yours()
        asked = _audience(audience)
        allowed = entry.allowed_audiences or self._rules.default_audiences
        if ANY_AUDIENCE not in allowed and not allowed.issuperset(asked):
            raise PolicyDenied(
                "the entry does not allow this audience",
                code="audience_denied",
                hint="add it to the entry's allowed_audiences, or to default_allowed_audiences",
            )
        ttl = timedelta(seconds=entry.jwt_svid_ttl) if entry.jwt_svid_ttl else self._rules.jwt_ttl
        return await self._sign_jwt(entry.spiffe_id, asked, ttl, actor=str(agent), entry=entry)

    async def mint_x509(self, wishes: Wishes, csr_der: bytes, ttl: timedelta | None, actor: str) -> SignedX509:
        """Sign for an operator, without an entry; raises Invalid."""
        self._check_mintable(wishes.spiffe_id)
        key = requested_key(csr_der, unproven="failed to verify CSR signature")
        authority, now = self._authorities.x509(), self._clock.now()
        validity = authority.validity(now, ttl or self._rules.x509_ttl)
        self._note_end("x509", authority.id, now + (ttl or self._rules.x509_ttl), validity.not_after)
        leaf = Leaf(wishes.spiffe_id, _serial(), validity, wishes.dns_names, subject=wishes.subject)
        decided = _Decided(authority, leaf, key, "", "")
        await self._store.write(_recorder([_x509_record(decided, actor, now)], [decided.issued("")]))
        self._count("x509", 1)
        return decided.sign()

    async def mint_jwt(
        self, spiffe_id: SpiffeId, audience: Sequence[str], ttl: timedelta | None, actor: str
    ) -> SignedJwt:
        """Sign a JWT-SVID for an operator, without an entry; raises Invalid."""
        self._check_mintable(spiffe_id)
        return await self._sign_jwt(spiffe_id, _audience(audience), ttl or self._rules.jwt_ttl, actor=actor, entry=None)

    def _decide(
        self, authority: X509Authority, entry: Entry | None, csr_der: bytes, now: datetime
    ) -> _Decided | BrokerError:
        try:
            if entry is None:
                raise _not_yours()
            key = requested_key(csr_der)
            ttl = timedelta(seconds=entry.x509_svid_ttl) if entry.x509_svid_ttl else self._rules.x509_ttl
            validity = authority.validity(now, ttl)
            leaf = Leaf(entry.spiffe_id, _serial(), validity, entry.dns_names)
        except BrokerError as error:
            return error
        self._note_end("x509", authority.id, now + ttl, validity.not_after)
        return _Decided(authority, leaf, key, entry.id, entry.hint)

    async def _sign_jwt(
        self, spiffe_id: SpiffeId, audience: tuple[str, ...], ttl: timedelta, *, actor: str, entry: Entry | None
    ) -> SignedJwt:
        authority, now = self._authorities.jwt(), self._clock.now()
        start = now.replace(microsecond=0)
        token_id = secrets.token_hex(TOKEN_ID_BYTES)
        expires_at = authority.expiry(now, ttl)
        self._note_end("jwt", authority.id, now + ttl, expires_at)
        claims = JwtSvidClaims(spiffe_id, audience, start - ISSUED_BEFORE, expires_at, token_id, self._rules.issuer)
        fields: dict[str, FieldValue] = {
            "kind": "jwt",
            "jti_hash": hashlib.sha256(token_id.encode()).hexdigest(),
            "audience": audience,
            "authority": authority.id,
            "expires_at": int(expires_at.timestamp()),
            **({"minted": True} if entry is None else {"entry_id": entry.id}),
        }
        await self._store.write(_recorder([Record(Event.SVID_ISSUED, now, actor, str(spiffe_id), fields)]))
        token = sign_jwt_svid(authority, claims)
        self._count("jwt", 1)
        return SignedJwt(spiffe_id, token, claims.issued_at, expires_at, "" if entry is None else entry.hint)

    def _note_end(self, kind: str, authority: str, wanted: datetime, given: datetime) -> None:
        """Say, once of each authority, that it is near its end and what it signs lives shorter than it was to."""
        if wanted - given <= ROUNDING or self._told.get(kind) == authority:
            return
        self._told[kind] = authority
        log.warning("svid_shortened", kind=kind, authority=authority, until=str(given), wanted=str(wanted))

    def _check_mintable(self, spiffe_id: SpiffeId) -> None:
        if spiffe_id.trust_domain != self._rules.trust_domain or not spiffe_id.path:
            raise Invalid("the SPIFFE ID is not a workload's in this trust domain", code="invalid_spiffe_id")
        if spiffe_id.path == "/spire" or spiffe_id.path.startswith("/spire/"):
            # NOTE(security): CVE-2021-27098: whoever can have the server's ID signed is the server.
            raise Invalid("IDs under /spire belong to the server and its agents", code="reserved_spiffe_id")

    async def _work(self, work: Callable[[], T], count: int) -> T:
        if count <= INLINE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)


def _recorder(records: Sequence[Record], issued: Sequence[IssuedSvid] = ()) -> Callable[[Writer], None]:
    def act(writer: Writer) -> None:
        seq = 0
        for record in records:
            seq = writer.record(record)
        if issued:
            writer.add_issued(seq, issued)

    return act


def _x509_record(decided: _Decided, actor: str, now: datetime) -> Record:
    fields: dict[str, FieldValue] = {
        "kind": "x509",
        "serial": f"{decided.leaf.serial:x}",
        "authority": decided.authority.id,
        "expires_at": int(decided.leaf.validity.not_after.timestamp()),
        **({"entry_id": decided.entry_id} if decided.entry_id else {"minted": True}),
    }
    return Record(Event.SVID_ISSUED, now, actor, str(decided.leaf.spiffe_id), fields)


def _audience(audience: Sequence[str]) -> tuple[str, ...]:
    # As in SPIRE: what is empty names nobody.
    asked = tuple(filter(None, dict.fromkeys(audience)))
    if not audience:
        raise Invalid("at least one audience is required", code="audience_missing")
    if not asked:
        raise Invalid("invalid JWT-SVID audience: cannot be empty", code="audience_missing")
    if len(asked) > MAX_AUDIENCES or any(len(one.encode("utf-8", "replace")) > MAX_TEXT for one in asked):
        raise Invalid(f"a JWT-SVID has at most {MAX_AUDIENCES} audiences of {MAX_TEXT} bytes", code="audience_too_many")
    return asked


def _serial() -> int:
    return profile.serial_number(secrets.randbits(profile.SERIAL_BITS))


def _not_yours() -> NotFound:
    # The same for an entry that is not there and one that is another agent's.
    return NotFound("entry not found or not authorized", code="entry_not_found")
