"""The authorities of this moment, in memory: who signs now, and what the world may verify with.

Fed by ``rotation`` after each commit and by nothing else, so what is here is already published. Callers take a value
and use it at once; they never keep one.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from broker.errors import Misconfigured, NotFound, Unavailable
from broker.keys import KeyManager, Signer
from broker.server.authority.jwt import JwtAuthority
from broker.server.authority.profile import issuer_key_id
from broker.server.authority.x509 import X509Authority
from broker.server.store.rows import (
    AdoptedAuthority,
    AuthorityKind,
    AuthorityRow,
    AuthorityState,
    Published,
    Source,
)
from broker.spiffe import Bundle, BundleSet, TrustDomain
from broker.spiffe.certificates import split_der
from broker.spiffe.jose import PublicKey
from broker.spiffe.revocation import NOTHING, Revocations

REFRESH_HINT: Final = 300
"""Seconds between two looks of a federated trust domain at our bundle; our own agents are told at once."""

T = TypeVar("T")
BundleKey = AuthorityRow | AdoptedAuthority
PublicKeys = Mapping[str, ec.EllipticCurvePublicKey]


class Authorities:
    """What signs and what verifies, per kind."""

    def __init__(self, trust_domain: TrustDomain, keys: KeyManager) -> None:
        self._trust_domain = trust_domain
        self._keys = keys
        self._published = Published()
        self._anchors: tuple[BundleKey, ...] = ()
        self._jwt_keys: tuple[BundleKey, ...] = ()
        self._tainted: frozenset[x509.Certificate] = frozenset()
        self._bundle = Bundle(trust_domain)
        self._bundles = BundleSet.of(self._bundle)
        self._task_keys: PublicKeys = MappingProxyType({})
        self._x509: X509Authority | None = None
        self._jwt: JwtAuthority | None = None
        self._task: Signer | None = None
        self._revoked = NOTHING
        self._listeners: list[Callable[[], None]] = []

    @property
    def rows(self) -> tuple[AuthorityRow, ...]:
        """The authorities of all replicas, of every kind and state."""
        return self._published.authorities

    @property
    def published(self) -> Published:
        """All that stands in the bundle, or signs."""
        return self._published

    @property
    def x509_keys(self) -> "tuple[BundleKey, ...]":
        """The X.509 authorities of the bundle, adopted ones included."""
        return self._anchors

    @property
    def jwt_keys(self) -> "tuple[BundleKey, ...]":
        """The JWT authorities of the bundle, adopted ones included."""
        return self._jwt_keys

    def is_tainted(self, authority: x509.Certificate) -> bool:
        """Tell whether nothing that this authority of the bundle vouches for should stay in use."""
        return authority in self._tainted

    @property
    def bundle(self) -> Bundle:
        """The own trust domain's bundle."""
        return self._bundle

    @property
    def bundles(self) -> BundleSet:
        """The bundles under which callers of this server are judged."""
        return self._bundles

    def x509(self) -> X509Authority:
        """Give the authority that signs X.509-SVIDs; Unavailable before the first is published."""
        return _required(self._x509, "X.509")

    def jwt(self) -> JwtAuthority:
        """Give the authority that signs JWT-SVIDs; Unavailable before the first is published."""
        return _required(self._jwt, "JWT")

    def task_signer(self) -> Signer:
        """Give the key that signs task tokens, its ``id`` being the ``kid``; Unavailable before the first is published."""
        return _required(self._task, "task-token")

    def task_keys(self) -> PublicKeys:
        """Give every published task-token key by its ``kid``: prepared, active and old, but none that is tainted."""
        return self._task_keys

    def replace(self, published: Published) -> None:
        """Take in what was committed, and tell the listeners if anything is new; raises Misconfigured (``key_mismatch``)."""
        before = self._published
        if published.authorities == before.authorities and published.adopted == before.adopted:
            # That a replica lives is news to the plan alone.
            self._published = published
            return
        rows = published.authorities
        x509_keys = _bundle_keys(published, AuthorityKind.X509)
        jwt_keys = _bundle_keys(published, AuthorityKind.JWT)
        anchors = {row.id: x509.load_der_x509_certificate(row.public) for row in x509_keys}
        self._choose_signers(rows)
        self._published, self._anchors, self._jwt_keys = published, x509_keys, jwt_keys
        self._tainted = frozenset(anchors[row.id] for row in x509_keys if row.tainted)
        self._bundle = Bundle(
            self._trust_domain,
            tuple(anchors.values()),
            {row.id: jwt_key(row) for row in jwt_keys},
            sequence=published.sequence,
            refresh_hint=REFRESH_HINT,
            revoked=self._revoked,
        )
        self._bundles = BundleSet.of(self._bundle)
        self._task_keys = MappingProxyType(public_keys(rows, AuthorityKind.TASK))
        self._tell()

    def set_revoked(self, serials: Mapping[str, frozenset[int]]) -> None:
        """Take in which serial numbers were revoked, by X.509 authority id, and tell the listeners."""
        self._revoked = Revocations(serials)
        self._bundle = self._bundle.with_revoked(self._revoked)
        self._bundles = self._bundles.with_bundle(self._bundle)
        self._tell()

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call on the event loop after every change of authorities; it must not block."""
        self._listeners.append(listener)

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def _choose_signers(self, rows: Collection[AuthorityRow]) -> None:
        active = {row.kind: row for row in rows if row.state is AuthorityState.ACTIVE and self._is_held(row)}
        x509_row, jwt_row = active.get(AuthorityKind.X509), active.get(AuthorityKind.JWT)
        task_row = active.get(AuthorityKind.TASK)
        self._x509 = None if x509_row is None else self._x509_authority(x509_row)
        self._jwt = None if jwt_row is None else JwtAuthority(jwt_row.id, jwt_row.not_after, self._signer(jwt_row))
        self._task = None if task_row is None else self._signer(task_row)

    def _x509_authority(self, row: AuthorityRow) -> X509Authority:
        return X509Authority.of(row.id, row.public, self._signer(row), row.chain, is_root=not row.upstream)

    def _is_held(self, row: AuthorityRow) -> bool:
        return row.id in self._keys.ids()

    def _signer(self, row: AuthorityRow) -> Signer:
        signer = self._keys.signer(row.id)
        # NOTE(security): a key that is not the published one would sign what nobody can verify, or worse, what
        # somebody can.
        if signer.public_key != _public_key(row):
            raise Misconfigured(f"the key {row.id} is not the one that was published", code="key_mismatch")
        return signer


def root_key_id(row: AuthorityRow) -> str:
    """Give the key identifier (hex) of the root above an authority: its issuer's, or that of the chain's last."""
    if not row.chain:
        return row.upstream
    return issuer_key_id(x509.load_der_x509_certificate(split_der(row.chain)[-1]))


def jwt_key(row: BundleKey) -> PublicKey:
    """Read a published JWT key; raises NotFound for one of a kind that JWT-SVIDs do not have."""
    key = load_der_public_key(row.public)
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise NotFound(f"the published key {row.id} is neither EC nor RSA", code="key_not_found")
    return key


def _bundle_keys(published: Published, kind: AuthorityKind) -> tuple[BundleKey, ...]:
    """Give what the bundle holds of one kind: below an upstream authority, roots instead of our own certificates."""
    keys: list[BundleKey] = [row for row in published.authorities if row.kind is kind and not row.upstream]
    ours = {row.id for row in keys}
    keys += [
        row for row in published.adopted if row.kind is kind and row.source is not Source.REVOKED and row.id not in ours
    ]
    return tuple(keys)


def public_keys(rows: Iterable[AuthorityRow], kind: AuthorityKind) -> dict[str, ec.EllipticCurvePublicKey]:
    """Give the public keys of one kind by authority id; a tainted task-token key verifies nothing more.

    SVIDs of a tainted authority are replaced while they still hold; a task token is asked for again within minutes anyway.
    """
    ends_at_once = kind is AuthorityKind.TASK
    return {row.id: _public_key(row) for row in rows if row.kind is kind and not (row.tainted and ends_at_once)}


def _public_key(row: AuthorityRow) -> ec.EllipticCurvePublicKey:
    if row.kind is AuthorityKind.X509:
        key: object = x509.load_der_x509_certificate(row.public).public_key()
    else:
        key = load_der_public_key(row.public)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise NotFound(f"the published key {row.id} is not an EC key", code="key_not_found")
    return key


def _required(authority: T | None, kind: str) -> T:
    if authority is None:
        raise Unavailable(
            f"no {kind} authority is active yet", code="authority_missing", hint="the server is starting; try again"
        )
    return authority
