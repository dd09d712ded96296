"""Trust bundles: the authorities of a trust domain, and the set of them that a verifier holds.

Reads and writes the SPIFFE bundle format and the two forms of the Workload API (SPIFFE Trust Domain and Bundle §4,
X509-SVID §6, JWT-SVID §6). Where bundles come from and when they are fetched again is not known here. An empty bundle
is valid, and then nothing of that trust domain verifies.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typing_extensions import override

from broker.errors import BrokerError, InvalidBundle, InvalidJson, InvalidSpiffeId, InvalidSvid, InvalidToken
from broker.spiffe import certificates, jose, strictjson
from broker.spiffe.chains import TrustAnchors
from broker.spiffe.ids import TrustDomain
from broker.spiffe.jose import PublicKey
from broker.spiffe.revocation import NOTHING, Revocations
from broker.spiffe.strictjson import JsonValue

X509_USE: Final = "x509-svid"
JWT_USE: Final = "jwt-svid"
MAX_NUMBER: Final = strictjson.MAX_INTEGER
"""Largest sequence and refresh hint: 64 bit without a sign, as SPIRE's API holds them."""

_KEY_TYPES: Final = frozenset({"EC", "RSA", "OKP"})


@dataclass(frozen=True, slots=True)
class Bundle:
    """The authorities of one trust domain. Immutable; equal content is an equal bundle."""

    trust_domain: TrustDomain
    x509_authorities: tuple[x509.Certificate, ...] = field(default=(), repr=False)
    jwt_authorities: Mapping[str, PublicKey] = field(default_factory=dict, repr=False, hash=False)
    sequence: int | None = None
    refresh_hint: int | None = None
    revoked: Revocations = field(default=NOTHING, repr=False)
    """What the X.509 authorities took back before its time; not part of the bundle's document."""
    anchors: TrustAnchors = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        authorities = tuple(dict.fromkeys(self.x509_authorities))
        if "" in self.jwt_authorities:
            raise InvalidBundle("a JWT authority has no key ID", code="bundle_key_id")
        _check_number(self.sequence, "sequence")
        _check_number(self.refresh_hint, "refresh hint")
        object.__setattr__(self, "x509_authorities", authorities)
        object.__setattr__(self, "jwt_authorities", MappingProxyType(dict(self.jwt_authorities)))
        object.__setattr__(self, "anchors", TrustAnchors(authorities))

    @classmethod
    def parse(cls, trust_domain: TrustDomain, document: bytes | str) -> Self:
        """Read a SPIFFE bundle; keys of unknown use or type are passed over, bad ones raise InvalidBundle (§4.1, §4.2)."""
        return cls._from_members(trust_domain, _read_object(document))

    @classmethod
    def from_workload_api(cls, trust_domain: TrustDomain, *, x509_der: bytes = b"", jwks: bytes | str = "") -> Self:
        """Read what the Workload API sends: concatenated DER and a JWK Set without uses; raises InvalidBundle."""
        keys: list[JsonValue] = _keys(_read_object(jwks)) if jwks else []
        try:
            authorities = tuple(certificates.load(der) for der in certificates.split_der(x509_der))
        except InvalidSvid as error:
            raise InvalidBundle(f"an X.509 authority: {error.message}", code="bundle_certificate") from None
        return cls(trust_domain, authorities, _jwt_authorities(keys, frozenset({None, JWT_USE, "sig"})))

    @classmethod
    def _from_members(cls, trust_domain: TrustDomain, members: Mapping[str, JsonValue]) -> Self:
        keys = _keys(members)
        return cls(
            trust_domain,
            x509_authorities=tuple(_x509_authorities(keys)),
            jwt_authorities=_jwt_authorities(keys, frozenset({JWT_USE})),
            sequence=_number(members, "spiffe_sequence"),
            refresh_hint=_number(members, "spiffe_refresh_hint"),
        )

    def to_json(self) -> str:
        """Write the SPIFFE bundle document, the same text for the same bundle (§4; X509-SVID §6.1, JWT-SVID §6.1)."""
        document: dict[str, object] = {
            "keys": [
                *(_x509_jwk(certificate) for certificate in self.x509_authorities),
                *({"use": JWT_USE, **jwk} for jwk in self._jwt_jwks()),
            ]
        }
        if self.sequence is not None:
            document["spiffe_sequence"] = self.sequence
        if self.refresh_hint is not None:
            document["spiffe_refresh_hint"] = self.refresh_hint
        return _compact(document)

    def jwks(self) -> str:
        """Write the JWT authorities alone as a plain JWK Set, the form of the Workload API."""
        return _compact({"keys": self._jwt_jwks()})

    def x509_der(self) -> bytes:
        """Write the X.509 authorities as concatenated DER, the form of the Workload API."""
        return b"".join(certificate.public_bytes(Encoding.DER) for certificate in self.x509_authorities)

    def with_x509_authorities(self, authorities: Iterable[x509.Certificate]) -> Self:
        """Give the same bundle with these X.509 authorities in place of its own."""
        return replace(self, x509_authorities=tuple(authorities))

    def with_jwt_authorities(self, authorities: Mapping[str, PublicKey]) -> Self:
        """Give the same bundle with these JWT authorities, by key ID, in place of its own."""
        return replace(self, jwt_authorities=authorities)

    def with_sequence(self, sequence: int | None) -> Self:
        """Give the same bundle with this sequence number; it must grow whenever the content changes (§4.1.1)."""
        return replace(self, sequence=sequence)

    def with_refresh_hint(self, seconds: int | None) -> Self:
        """Give the same bundle with this refresh hint in seconds (§4.1.2)."""
        return replace(self, refresh_hint=seconds)

    def with_revoked(self, revoked: Revocations) -> Self:
        """Give the same bundle with these X.509 certificates taken back."""
        return replace(self, revoked=revoked)

    def _jwt_jwks(self) -> list[dict[str, str]]:
        return [{"kid": kid, **jose.jwk_from_public_key(key)} for kid, key in sorted(self.jwt_authorities.items())]


class BundleSet(Mapping[TrustDomain, Bundle]):
    """Bundles by the trust domain each belongs to. Immutable: what a verifier holds changes by exchanging the set."""

    __slots__ = ("_bundles",)

    def __init__(self, bundles: Iterable[Bundle] = ()) -> None:
        by_domain: dict[TrustDomain, Bundle] = {}
        for bundle in bundles:
            if by_domain.setdefault(bundle.trust_domain, bundle) is not bundle:
                raise InvalidBundle(f"there are two bundles of {bundle.trust_domain}", code="bundle_duplicate")
        self._bundles = by_domain

    @classmethod
    def of(cls, *bundles: Bundle) -> Self:
        """Make a set of these; two of one trust domain raise InvalidBundle."""
        return cls(bundles)

    @classmethod
    def parse_map(cls, document: bytes | str) -> Self:
        """Read a SPIFFE bundle map; refresh hints inside of it are dropped; raises InvalidBundle (§4.3)."""
        domains = _read_object(document).get("trust_domains")
        if not isinstance(domains, dict):
            raise InvalidBundle("the bundle map has no trust_domains", code="bundle_malformed")
        return cls(_inner_bundle(name, members) for name, members in domains.items())

    def with_bundle(self, bundle: Bundle) -> Self:
        """Give the same set with this bundle in place of its trust domain's own."""
        return type(self)({**self._bundles, bundle.trust_domain: bundle}.values())

    def without(self, trust_domain: TrustDomain) -> Self:
        """Give the same set without this trust domain: nothing of it verifies any more."""
        return type(self)(bundle for bundle in self._bundles.values() if bundle.trust_domain != trust_domain)

    @override
    def __getitem__(self, trust_domain: TrustDomain) -> Bundle:
        return self._bundles[trust_domain]

    @override
    def __iter__(self) -> Iterator[TrustDomain]:
        return iter(self._bundles)

    @override
    def __len__(self) -> int:
        return len(self._bundles)

    @override
    def __repr__(self) -> str:
        return f"BundleSet({', '.join(sorted(map(str, self._bundles)))})"


def _read_object(document: bytes | str) -> dict[str, JsonValue]:
    try:
        value = strictjson.loads(document.encode() if isinstance(document, str) else document)
    except (InvalidJson, UnicodeEncodeError) as error:
        text = error.message if isinstance(error, BrokerError) else "it is not Unicode text"
        raise InvalidBundle(f"the bundle: {text}", code="bundle_malformed") from None
    if not isinstance(value, dict):
        raise InvalidBundle("the bundle is not a JSON object", code="bundle_malformed")
    return value


def _keys(members: Mapping[str, JsonValue]) -> list[JsonValue]:
    keys = members.get("keys")
    if not isinstance(keys, list):
        raise InvalidBundle(
            "the bundle has no keys", code="bundle_malformed", hint="an empty bundle is written as an empty list"
        )
    return keys


def _number(members: Mapping[str, JsonValue], name: str) -> int | None:
    value = members.get(name)
    if name in members and (not isinstance(value, int) or isinstance(value, bool)):
        raise InvalidBundle(f"{name} is not an integer", code="bundle_number")
    return value if isinstance(value, int) else None


def _check_number(value: int | None, name: str) -> None:
    if value is not None and not 0 <= value <= MAX_NUMBER:
        raise InvalidBundle(f"the bundle's {name} is out of range", code="bundle_number")


def _known(keys: list[JsonValue], uses: frozenset[str | None]) -> Iterator[dict[str, JsonValue]]:
    # §4.2.1, §4.2.2: a key whose use or type is missing or unknown is passed over as a whole.
    for jwk in keys:
        if not isinstance(jwk, dict):
            raise InvalidBundle("a key of the bundle is not an object", code="bundle_malformed")
        use, kty = jwk.get("use"), jwk.get("kty")
        if (use is None or isinstance(use, str)) and use in uses and isinstance(kty, str) and kty in _KEY_TYPES:
            yield jwk


def _x509_authorities(keys: list[JsonValue]) -> Iterator[x509.Certificate]:
    for jwk in _known(keys, frozenset({X509_USE})):
        # X509-SVID §6.1: no chain, no authority; and only the first certificate counts.
        chain = jwk.get("x5c")
        if chain is None or chain == []:
            continue
        first = chain[0] if isinstance(chain, list) else None
        try:
            certificate = certificates.load(base64.b64decode(str(first).encode("ascii"), validate=True))
        except (ValueError, InvalidSvid):
            raise InvalidBundle("an x5c of the bundle is not a certificate", code="bundle_certificate") from None
        _check_same_key(jwk, certificate)
        yield certificate


def _check_same_key(jwk: Mapping[str, JsonValue], certificate: x509.Certificate) -> None:
    # RFC 7517 §4.7: the key is written twice. Two keys would be one for whoever reads the other.
    ours = _certificate_key(certificate)
    if ours and any(jwk.get(name) != value for name, value in ours.items()):
        raise InvalidBundle("a key of the bundle is not the key of its certificate", code="bundle_key_mismatch")
    if not jose.PRIVATE_MEMBERS.isdisjoint(jwk):
        raise InvalidBundle("the bundle holds a private key", code="bundle_private_key")


def _jwt_authorities(keys: list[JsonValue], uses: frozenset[str | None]) -> dict[str, PublicKey]:
    authorities: dict[str, PublicKey] = {}
    for jwk in _known(keys, uses):
        if not _may_verify(jwk):
            continue
        kid = jwk.get("kid")
        if not isinstance(kid, str) or not kid:
            raise InvalidBundle("a JWT authority has no key ID", code="bundle_key_id")
        if kid in authorities:
            raise InvalidBundle("two JWT authorities have one key ID", code="bundle_key_id")
        try:
            authorities[kid] = jose.public_key_from_jwk(jwk)
        except InvalidToken as error:
            raise InvalidBundle(f"a JWT authority: {error.message}", code=error.reason) from None
    return authorities


def _may_verify(jwk: Mapping[str, JsonValue]) -> bool:
    # A kind of key or curve that JWT-SVIDs do not use is passed over, as is a key that is meant for something else.
    operations, alg, curve = jwk.get("key_ops", ["verify"]), jwk.get("alg"), jwk.get("crv")
    usable = jwk.get("kty") != "OKP" and (curve is None or (isinstance(curve, str) and curve in jose.CURVES))
    fits = alg is None or (isinstance(alg, str) and alg in jose.ALGORITHMS)
    return usable and fits and isinstance(operations, list) and "verify" in operations


def _inner_bundle(name: str, members: JsonValue) -> Bundle:
    if not isinstance(members, dict):
        raise InvalidBundle("a bundle of the map is not an object", code="bundle_malformed")
    try:
        trust_domain = TrustDomain(name)
    except InvalidSpiffeId as error:
        raise InvalidBundle(f"a name of the bundle map: {error.message}", code=error.reason) from None
    # §4.3: an inner refresh hint must change nothing. Dropped here, nobody can obey it.
    return Bundle._from_members(trust_domain, members).with_refresh_hint(None)  # noqa: SLF001 - the same module


def _x509_jwk(certificate: x509.Certificate) -> dict[str, object]:
    key = _certificate_key(certificate)
    if not key:
        raise InvalidBundle("an X.509 authority's kind of key has no JWK", code="bundle_certificate")
    return {"use": X509_USE, **key, "x5c": [base64.b64encode(certificate.public_bytes(Encoding.DER)).decode("ascii")]}


def _certificate_key(certificate: x509.Certificate) -> dict[str, str]:
    try:
        key = certificate.public_key()
        if isinstance(key, ed25519.Ed25519PublicKey):
            raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
            return {"kty": "OKP", "crv": "Ed25519", "x": jose.b64url_encode(raw)}
        return jose.jwk_from_public_key(key) if isinstance(key, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey)) else {}
    except (ValueError, InvalidToken):
        return {}


def _compact(document: Mapping[str, object]) -> str:
    return json.dumps(document, separators=(",", ":"), allow_nan=False)
