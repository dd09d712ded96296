"""Node attestation by a certificate and proof of its key, both halves; SPIRE's ``x509pop`` on the wire.

The node sends its chain; the server verifies it to the operator's authorities (mode ``external_pki``) or to the trust
domain's own bundle (mode ``spiffe``), then asks for a signature over a fresh nonce. That nonce lives in one attestation
only, so no other's response fits. Everything that costs work is bounded before it is done: a node needs no certificate
to get this far. Who is banned, and the life of what is issued, is not known here.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import unquote

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from broker.attestation.agent_path import Fields, PathTemplate
from broker.attestation.certificate_files import authorities_of, content_of
from broker.attestation.contract import AttestedNode, AttestorFailed, ChallengeWith, Evidence, Home
from broker.attestation.possession import Challenge, PrivateKey, PublicKey, answer, chain_message, read_chain
from broker.clock import Clock, SystemClock
from broker.errors import Invalid, InvalidJson, InvalidSelector, InvalidSvid, Misconfigured, NotAttested
from broker.spiffe import BundleSet, Selector, SpiffeId, TrustDomain, certificates, verify_x509_svid
from broker.spiffe.certificates import MAX_RSA_BITS, MIN_RSA_BITS, Authority, Facts
from broker.spiffe.chains import MAX_CHAIN, TrustAnchors, find_path

NAME = "x509pop"
MAX_EXPONENT = 2**31 - 1  # of an RSA key, as in Go: a longer one makes each check some hundred times dearer
MAX_SANS = 64  # san selectors of one node: they are stored, and held against each entry
TEMPLATES = {
    "external_pki": "{{ .PluginName }}/{{ .Fingerprint }}",
    "spiffe": "{{ .PluginName }}/{{ .SVIDPathTrimmed }}",
}
_OWN = ("Fingerprint", "Subject.CommonName", "SerialNumberHex", "URISanSelectors.")
FIELDS = {
    "external_pki": Fields(_OWN),
    "spiffe": Fields((*_OWN, "SVIDPathTrimmed"), paths=("SVIDPathTrimmed",)),
}


class X509PopSettings(BaseModel):
    """Where the agent finds its certificate and key. The files are read at each attestation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    private_key_path: Path = Field(description="The private key, PEM without a password.")
    certificate_path: Path = Field(description="The node's certificate, then intermediates if there are any, PEM.")
    intermediates_path: Path | None = Field(default=None, description="Further intermediates, PEM.")


class X509PopServerSettings(BaseModel):
    """Whose certificates count, and how their nodes are named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["external_pki", "spiffe"] = Field(
        default="external_pki", description="external_pki: authorities from files; spiffe: the trust domain's own."
    )
    svid_prefix: str = Field(
        default="/spire-exchange", description="Mode spiffe: only SVIDs with a path below this one count."
    )
    ca_bundle_path: Path | None = Field(default=None, description="Mode external_pki: the authorities, PEM.")
    ca_bundle_paths: tuple[Path, ...] = Field(default=(), description="The same, in several files.")
    agent_path_template: str = Field(default="", description="The agent's path; empty: the mode's usual one.")
    max_intermediates: int = Field(
        default=4, ge=1, le=MAX_CHAIN - 1, description="Most intermediates that a node may send."
    )
    max_rsa_key_size: int = Field(
        default=MAX_RSA_BITS, ge=MIN_RSA_BITS, le=MAX_RSA_BITS, description="Largest RSA key in bits."
    )

    @field_validator("svid_prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        prefix = value.removesuffix("/")
        # Empty would let every workload of the trust domain become a node.
        if not prefix.startswith("/"):
            raise ValueError("it is a path such as /spire-exchange, and never empty")
        try:
            SpiffeId.of(TrustDomain("example.org"), prefix)
        except Invalid as error:
            raise ValueError(error.message) from None
        return prefix

    @model_validator(mode="after")
    def _consistent(self) -> "X509PopServerSettings":
        named = (self.ca_bundle_path is not None) + bool(self.ca_bundle_paths)
        if self.mode == "external_pki" and named != 1:
            raise ValueError("set one of ca_bundle_path and ca_bundle_paths")
        if self.mode == "spiffe" and named:
            raise ValueError("mode spiffe has no ca_bundle_path: it trusts the trust domain's own bundle")
        self.template()
        return self

    def template(self) -> PathTemplate:
        """Read the template; raises ValueError, as pydantic wants it."""
        text = self.agent_path_template or TEMPLATES[self.mode]
        return PathTemplate.parse(text, FIELDS[self.mode], plugin=NAME)


class X509PopAgent:
    """The agent's half: sends the chain and signs the server's nonce, once for each attestation."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = X509PopSettings

    def __init__(self, settings: X509PopSettings) -> None:
        self._settings = settings
        self._key: PrivateKey | None = None

    async def evidence(self) -> Evidence:
        """Read the files and give the chain; raises ``AttestorFailed``."""
        self._key, chain = await asyncio.to_thread(self._read)
        return Evidence(NAME, chain_message(chain))

    async def respond(self, challenge: bytes) -> bytes:
        """Sign the nonce of the one challenge that follows the evidence; raises ``AttestorFailed``."""
        key, self._key = self._key, None
        if key is None:
            raise AttestorFailed("the server challenged without evidence, or twice")
        try:
            return answer(key, challenge)
        except InvalidJson as error:
            raise AttestorFailed(f"the server's challenge: {error.message}") from None

    def _read(self) -> tuple[PrivateKey, list[bytes]]:
        settings = self._settings
        try:
            key = load_pem_private_key(content_of(settings.private_key_path), password=None)
            chain = x509.load_pem_x509_certificates(content_of(settings.certificate_path))
            if settings.intermediates_path is not None:
                chain += x509.load_pem_x509_certificates(content_of(settings.intermediates_path))
            ours, theirs = (_spki(one) for one in (key.public_key(), chain[0].public_key()))
        except OSError as error:
            raise AttestorFailed(f"{error.filename} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
            # What the library says may quote the file.
            raise AttestorFailed(
                "the node's key or certificate is not readable PEM", hint="the key must not have a password"
            ) from None
        if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
            raise AttestorFailed("the node's key is neither RSA nor EC")
        if ours != theirs:
            raise AttestorFailed("the node's key does not belong to its certificate")
        return key, [certificate.public_bytes(Encoding.DER) for certificate in chain]


@dataclass(frozen=True, slots=True)
class _Vouched:
    """A leaf that an authority vouches for, the authorities up to ours, and what is left of an SVID's own path."""

    leaf: Facts
    authorities: tuple[x509.Certificate, ...]
    trimmed: str = ""


@dataclass(frozen=True, slots=True)
class _Claim:
    """What the node is, if it has the key."""

    key: PublicKey
    path: str
    selectors: frozenset[Selector]


class X509PopServer:
    """The server's half: judges the chain, then the signature over its nonce."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = X509PopServerSettings

    def __init__(self, settings: X509PopServerSettings, clock: Clock | None = None) -> None:
        """Read the authorities; raises Misconfigured for a file without any, or with one that may not sign."""
        self._settings = settings
        self._clock = clock or SystemClock()
        self._template = settings.template()
        files = settings.ca_bundle_paths if settings.ca_bundle_path is None else (settings.ca_bundle_path,)
        self._anchors = TrustAnchors(certificate for path in files for certificate in authorities_of(path))
        self._home: Home | None = None

    def settle(self, home: Home) -> None:
        """Take what the server tells of itself; once, before the first node."""
        self._home = home

    async def verify(self, evidence: Evidence, challenge_with: ChallengeWith) -> AttestedNode:
        """Judge the chain, then have the node prove its key; raises ``NotAttested``."""
        if self._home is None:
            raise Misconfigured("the attestor was not told its server's trust domain")
        chain = read_chain(evidence.payload, self._settings.max_intermediates + 1)
        try:
            # In a thread: the dearest chain that is still allowed takes some ten milliseconds.
            claim = await asyncio.to_thread(self._judge, chain, self._home)
        except InvalidSvid as error:
            raise self._explained(error) from None
        # NOTE(security): made here and kept nowhere, so it is this attestation's alone.
        challenge = Challenge.to(claim.key)
        challenge.check(await challenge_with(challenge.message()))
        return AttestedNode(path=claim.path, selectors=claim.selectors, reattestable=True)

    def _judge(self, chain: Sequence[bytes], home: Home) -> _Claim:
        for der in chain:
            self._check_cost(certificates.load(der))
        now = self._clock.now()
        node = self._own(chain, home, now) if self._settings.mode == "spiffe" else self._external(chain, now)
        key = node.leaf.certificate.public_key()
        if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
            raise InvalidSvid("its key is neither RSA nor EC", code="svid_key_type")
        name, sans = _common_name(node.leaf), _sans(node.leaf, home.trust_domain)
        path = self._template.path(_fields(node, name, sans, home.trust_domain))
        return _Claim(key, path, _selectors(node, name, sans))

    def _own(self, chain: Sequence[bytes], home: Home, now: datetime) -> _Vouched:
        svid = verify_x509_svid(chain, BundleSet.of(home.bundle()), now=now)
        prefix = f"{self._settings.svid_prefix}/"
        if not svid.id.path.startswith(prefix):
            raise InvalidSvid("the SVID's path is not below svid_prefix", code="svid_prefix")
        leaf = certificates.read(svid.leaf)
        return _Vouched(leaf, (*svid.chain[1:], svid.authority), svid.id.path.removeprefix(prefix))

    def _external(self, chain: Sequence[bytes], now: datetime) -> _Vouched:
        leaf = certificates.read(certificates.load(chain[0]))
        if leaf.is_ca:
            raise InvalidSvid("it is an authority's own", code="svid_leaf_is_ca")
        if leaf.key_usage is None or not leaf.key_usage.digital_signature:
            raise InvalidSvid("its key usage lacks digitalSignature", code="svid_key_usage")
        intermediates = [_intermediate(der) for der in chain[1:]]
        return _Vouched(leaf, find_path(leaf, intermediates, self._anchors, now=now)[1:])

    def _explained(self, error: InvalidSvid) -> NotAttested:
        text, hint = error.message, error.hint
        if error.reason == "svid_untrusted" and self._settings.mode == "external_pki":
            text, hint = "no authority of ca_bundle_path vouches for it", "does the node send all intermediates?"
        code = f"certificate_{error.reason.removeprefix('svid_')}"
        return NotAttested(f"the node's certificate: {text}", code=code, hint=hint)

    def _check_cost(self, certificate: x509.Certificate) -> None:
        try:
            key = certificate.public_key()
        except (ValueError, UnsupportedAlgorithm):
            raise InvalidSvid("a key is of an unknown kind", code="svid_weak_key") from None
        if isinstance(key, rsa.RSAPublicKey) and (
            key.key_size > self._settings.max_rsa_key_size or key.public_numbers().e > MAX_EXPONENT
        ):
            raise InvalidSvid("an RSA key is too large", code="svid_key_size")


def _intermediate(der: bytes) -> Authority:
    # As read_authority, but for any extended usage: in somebody else's PKI it is theirs to say (SPIRE does the same).
    facts = certificates.read(certificates.load(der))
    if not (facts.is_ca and facts.basic_critical):
        raise InvalidSvid("an intermediate is not marked as an authority", code="svid_issuer_not_ca")
    if facts.key_usage is None or not facts.key_usage.key_cert_sign:
        raise InvalidSvid("an intermediate may not sign certificates", code="svid_issuer_key_usage")
    return Authority(facts, self_issued=facts.subject() == facts.certificate.issuer)


def _sans(facts: Facts, trust_domain: TrustDomain) -> frozenset[tuple[str, str]]:
    """Read ``x509pop://<trust domain>/<key>/<value>`` names; what has no key and value is passed over, as in SPIRE."""
    found = set()
    for uri in facts.uris():
        head, _, tail = uri.partition(f"{NAME}://{trust_domain}/")
        key, _, value = unquote(tail).strip("/").partition("/")
        # A key with a colon would make one selector of two meanings; a query or fragment is no part of the path; what
        # is not UTF-8 would be the same as something else that is not.
        if not head and key and value and ":" not in key and not {"?", "#"} & set(tail) and "\ufffd" not in key + value:
            found.add((key, value))
    if len(found) > MAX_SANS:
        raise InvalidSvid(f"it has more than {MAX_SANS} {NAME} names", code="svid_names")
    return frozenset(found)


def _fields(node: _Vouched, name: str, sans: frozenset[tuple[str, str]], trust_domain: TrustDomain) -> dict[str, str]:
    keys = [key for key, _ in sans]
    return {
        "PluginName": NAME,
        "TrustDomain": trust_domain.name,
        "Fingerprint": _fingerprint(node.leaf.certificate),
        "Subject.CommonName": name,
        "SerialNumberHex": _serial(node.leaf.certificate),
        "SVIDPathTrimmed": node.trimmed,
        # A key with two values names nothing.
        **{f"URISanSelectors.{key}": value for key, value in sans if keys.count(key) == 1},
    }


def _selectors(node: _Vouched, name: str, sans: frozenset[tuple[str, str]]) -> frozenset[Selector]:
    values = [f"ca:fingerprint:{_fingerprint(authority)}" for authority in node.authorities]
    values.append(f"serialnumber:{_serial(node.leaf.certificate)}")
    if name:
        values.append(f"subject:cn:{name}")
    values += [f"san:{key}:{value}" for key, value in sans]
    return frozenset(filter(None, map(_selector, values)))


def _selector(value: str) -> Selector | None:
    try:
        return Selector.of(NAME, value)
    except InvalidSelector:
        # Control characters and the like: no entry can ask for it, and to have fewer gives a node nothing more.
        return None


def _common_name(facts: Facts) -> str:
    names = [one.value for one in facts.subject().get_attributes_for_oid(NameOID.COMMON_NAME)]
    # Of two names nobody can say which one its authority meant.
    return names[0] if len(names) == 1 and isinstance(names[0], str) else ""


def _serial(certificate: x509.Certificate) -> str:
    text = f"{certificate.serial_number:x}"
    return text if len(text) % 2 == 0 else f"0{text}"


def _fingerprint(certificate: x509.Certificate) -> str:
    # NOTE(security): SHA-1 only names a certificate that its authority vouches for; SPIRE's IDs and selectors are so.
    return hashlib.sha1(certificate.public_bytes(Encoding.DER), usedforsecurity=False).hexdigest()


def _spki(key: object) -> bytes:
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise TypeError("another kind of key")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
