"""The authorities of this moment, in memory: who signs now, and what the world may verify with.

Fed by ``rotation`` after each commit and by nothing else, so what is here is already published. Callers take a value
and use it at once; they never keep one.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from broker.errors import Misconfigured, NotFound, Unavailable
from broker.keys import KeyManager, Signer
from broker.server.authority.jwt import JwtAuthority
from broker.server.authority.x509 import X509Authority
from broker.server.store.bundle_rows import jwt_public_key
from broker.server.store.rows import AuthorityKind, AuthorityRow, AuthorityState
from broker.spiffe import Bundle, BundleSet, TrustDomain

REFRESH_HINT: Final = 300
"""Seconds between two looks of a federated trust domain at our bundle; our own agents are told at once."""

T = TypeVar("T")
PublicKeys = Mapping[str, ec.EllipticCurvePublicKey]


class Authorities:
    """What signs and what verifies, per kind."""

    def __init__(self, trust_domain: TrustDomain, keys: KeyManager) -> None:
        self._trust_domain = trust_domain
        self._keys = keys
        self._rows: tuple[AuthorityRow, ...] = ()
        self._bundle = Bundle(trust_domain)
        self._bundles = BundleSet.of(self._bundle)
        self._task_keys: PublicKeys = MappingProxyType({})
        self._x509: X509Authority | None = None
        self._jwt: JwtAuthority | None = None
        self._task: Signer | None = None
        self._listeners: list[Callable[[], None]] = []

    @property
    def rows(self) -> tuple[AuthorityRow, ...]:
        """All published authorities, of every kind and state."""
        return self._rows

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
        """Give every published task-token key by its ``kid``: prepared, active and old."""
        return self._task_keys

    def replace(self, rows: Iterable[AuthorityRow], sequence: int) -> None:
        """Take in what was committed, and tell the listeners if anything is new."""
        fresh = tuple(rows)
        if fresh == self._rows and sequence == self._bundle.sequence:
            return
        self._rows = fresh
        self._bundle = Bundle(
            self._trust_domain,
            tuple(x509.load_der_x509_certificate(row.public) for row in fresh if row.kind is AuthorityKind.X509),
            # Appended ones may be of another kind than those that are made here.
            {row.id: jwt_public_key(row.public) for row in fresh if row.kind is AuthorityKind.JWT},
            sequence=sequence,
            refresh_hint=REFRESH_HINT,
        )
        self._bundles = BundleSet.of(self._bundle)
        self._task_keys = MappingProxyType(public_keys(fresh, AuthorityKind.TASK))
        self._choose_signers(fresh)
        for listener in tuple(self._listeners):
            listener()

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call on the event loop after every change of authorities; it must not block."""
        self._listeners.append(listener)

    def _choose_signers(self, rows: Collection[AuthorityRow]) -> None:
        active = {row.kind: row for row in rows if row.state is AuthorityState.ACTIVE and self._is_held(row)}
        x509_row, jwt_row = active.get(AuthorityKind.X509), active.get(AuthorityKind.JWT)
        task_row = active.get(AuthorityKind.TASK)
        self._x509 = (
            None if x509_row is None else X509Authority.of(x509_row.id, x509_row.public, self._signer(x509_row))
        )
        self._jwt = None if jwt_row is None else JwtAuthority(jwt_row.id, jwt_row.not_after, self._signer(jwt_row))
        self._task = None if task_row is None else self._signer(task_row)

    def _is_held(self, row: AuthorityRow) -> bool:
        return row.id in self._keys.ids()

    def _signer(self, row: AuthorityRow) -> Signer:
        signer = self._keys.signer(row.id)
        # NOTE(security): a key that is not the published one would sign what nobody can verify, or worse, what
        # somebody can.
        if signer.public_key != _public_key(row):
            raise Misconfigured(f"the key {row.id} is not the one that was published", code="key_mismatch")
        return signer


def public_keys(rows: Iterable[AuthorityRow], kind: AuthorityKind) -> dict[str, ec.EllipticCurvePublicKey]:
    """Give the public keys of one kind by authority id."""
    return {row.id: _public_key(row) for row in rows if row.kind is kind}


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
