"""Servers below us: an authority under ours for their X.509 key, and a place in our bundle for their JWT keys.

What they sign is valid in the whole trust domain, so only an SVID with a downstream entry gets here (the table of
roles). Of a certificate request nothing counts but the key.
"""

import secrets
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.clock import Clock
from broker.errors import Conflict, Invalid, Refused
from broker.server.authority import profile
from broker.server.authority.authorities import Authorities, jwt_key
from broker.server.authority.csr import requested_key
from broker.server.authority.rotation import Rotation
from broker.server.authority.upstream import PublicJwtKey, Upstream
from broker.server.store.ports import Store
from broker.server.store.rows import AdoptedAuthority, AuthorityKind, Source
from broker.spiffe import TrustDomain

MAX_JWT_KEYS: Final = 1000
"""JWT keys in our bundle: each workload of the trust domain is sent all of them."""
MAX_KEY_ID: Final = 256
MAX_KEY: Final = 2048
"""Bytes of a DER SubjectPublicKeyInfo: RSA-4096 has 550."""


@dataclass(frozen=True, slots=True)
class DownstreamAuthority:
    """A new authority's chain (it first, without the root), and the roots of the trust domain, all DER."""

    chain_der: tuple[bytes, ...] = field(repr=False)
    roots_der: tuple[bytes, ...] = field(repr=False)


class Downstream:
    """The use cases of servers below this one."""

    def __init__(
        self,
        store: Store,
        authorities: Authorities,
        rotation: Rotation,
        upstream: Upstream,
        clock: Clock,
        *,
        trust_domain: TrustDomain,
        ca_ttl: timedelta,
    ) -> None:
        """``ca_ttl``: the life of an authority whose request does not say; none outlives ours."""
        self._store = store
        self._authorities = authorities
        self._rotation = rotation
        self._upstream = upstream
        self._clock = clock
        self._trust_domain = trust_domain
        self._ca_ttl = ca_ttl

    async def certify(self, csr_der: bytes, preferred_ttl: timedelta | None, actor: str) -> DownstreamAuthority:
        """Sign an authority for a server below; raises Invalid, Refused (``path_length``), Unavailable."""
        key = requested_key(csr_der)
        authority, now = self._authorities.x509(), self._clock.now()
        validity = authority.validity(now, preferred_ttl or self._ca_ttl)
        serial = profile.serial_number(secrets.randbits(profile.SERIAL_BITS))
        chain = authority.certify(self._trust_domain, key, serial, validity)
        fields: dict[str, FieldValue] = {
            "kind": "x509_authority",
            "serial": f"{serial:x}",
            "authority": authority.id,
            "expires_at": int(validity.not_after.timestamp()),
        }
        record = Record(Event.SVID_ISSUED, now, actor, str(self._trust_domain), fields)
        # It is kept back until it is recorded.
        await self._store.write(lambda writer: writer.record(record))
        return DownstreamAuthority(chain, tuple(row.public for row in self._authorities.x509_keys))

    async def publish(self, key: PublicJwtKey, actor: str) -> None:
        """Put a JWT key of a server below into our bundle, and that above us; raises Invalid, Conflict, Refused."""
        row = AdoptedAuthority(AuthorityKind.JWT, key.id, key.public, key.not_after, Source.DOWNSTREAM)
        self._check(row)
        above = await self._upstream.publish(key)
        # What is published above comes back from there, and goes when it goes there.
        await self._rotation.adopt(above or (row,), actor=actor)

    def _check(self, row: AdoptedAuthority) -> None:
        if not row.id or len(row.id) > MAX_KEY_ID or len(row.public) > MAX_KEY:
            raise Invalid("invalid JWT authority: missing key ID", code="invalid_jwt_authority")
        try:
            jwt_key(row)
        except (ValueError, TypeError):
            raise Invalid("invalid JWT authority: the key cannot be read", code="invalid_jwt_authority") from None
        if row.not_after <= self._clock.now():
            raise Invalid("invalid JWT authority: it has expired", code="invalid_jwt_authority")
        known = self._authorities.jwt_keys
        # NOTE(security): a key ID stands for one key for ever, or one server could sign in the name of another's.
        if any(one.id == row.id and one.public != row.public for one in known):
            raise Conflict("another JWT key has this key ID", code="key_exists")
        if len(known) >= MAX_JWT_KEYS and all(one.id != row.id for one in known):
            raise Refused("the bundle holds too many JWT keys", code="bundle_full")
