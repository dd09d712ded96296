"""Node attestation by a TPM 2.0, both halves: credential activation.

The node sends its endorsement key, certified or bare, and the public area of an attestation key. The server judges the
first by the makers' authorities, by a list of keys, or by both; it then wraps a fresh secret so that only the TPM with
that endorsement key can open it, and only while it holds that attestation key. The secret lives in one attestation, so
no other's response fits. The TPM's format and cryptography stand in ``broker.attestation``.
"""

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict, Field, model_validator

from broker.attestation.base64_json import members, octets, read, text
from broker.attestation.certificate_files import read_authorities, read_certificate
from broker.attestation.contract import AttestedNode, AttestorFailed, ChallengeWith, Evidence
from broker.attestation.reads import BlockingReads
from broker.attestation.tpm_credential import SECRET, EndorsementKey, make_credential
from broker.attestation.tpm_device import Kind, Tpm, TpmDevice
from broker.attestation.tpm_public import MAX_PUBLIC, AttestationKey, read_attestation_key
from broker.clock import Clock, SystemClock
from broker.errors import InvalidJson, InvalidSelector, InvalidSvid, Misconfigured, NotAttested, Unavailable
from broker.spiffe import Selector, certificates
from broker.spiffe.certificates import Facts
from broker.spiffe.chains import TrustAnchors, find_path

NAME = "tpm"
TPM_TIMEOUT = 20.0  # seconds for one question to the TPM: slow ones make an RSA key in ten, the server waits thirty
MAX_EK = 8 * 1024  # bytes of a certificate or key: certificates of TPMs have 1.5 KiB
MAX_CREDENTIAL = 1024  # bytes of each half of a challenge: RSA-3072 needs 386
_CERTIFICATE, _PUBLIC, _AK = "ek_certificate", "ek_public", "ak_public"
_BLOB, _SEED, _SECRET = "credential_blob", "encrypted_seed", "secret"
_EK_PURPOSE = x509.ObjectIdentifier("2.23.133.8.1")  # tcg-kp-EKCertificate (EK Credential Profile §3.5.16)
T = TypeVar("T")


class TpmSettings(BaseModel):
    """Which TPM, and which of its endorsement keys. The TPM is asked at each attestation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tcti: str = Field(
        default="device:/dev/tpmrm0", min_length=1, description="The TPM as tpm2-tss names it; swtpm:path=… for swtpm."
    )
    ek: Kind = Field(default="rsa-2048", description="The endorsement key: rsa-2048, ecc-p256, ecc-p384 or rsa-3072.")
    ek_certificate_path: Path | None = Field(
        default=None, description="Its certificate, PEM or DER; unset: the one in the TPM, if there is one."
    )


class TpmServerSettings(BaseModel):
    """Which TPMs count."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ca_path: Path | None = Field(
        default=None, description="The makers' authorities: a directory of PEM and DER files, or one file."
    )
    hash_path: Path | None = Field(
        default=None, description="A directory of empty files, each named after an endorsement key's hash."
    )
    accept: Literal["either", "both"] = Field(
        default="either", description="Where both are set: whether one of them is enough, or a TPM needs both."
    )

    @model_validator(mode="after")
    def _something(self) -> "TpmServerSettings":
        if self.ca_path is None and self.hash_path is None:
            raise ValueError("set ca_path, hash_path, or both")
        if self.accept == "both" and (self.ca_path is None or self.hash_path is None):
            raise ValueError("accept = both needs ca_path and hash_path")
        return self


class TpmAgent:
    """The agent's half: asks the TPM, in a thread and not for ever."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = TpmSettings

    def __init__(self, settings: TpmSettings, tpm: Tpm | None = None) -> None:
        """Load the TPM's library; raises Misconfigured where it is missing."""
        self._settings = settings
        self._tpm: Tpm = tpm or TpmDevice(settings.tcti, settings.ek)
        self._reads = BlockingReads()
        self._asked = False

    async def evidence(self) -> Evidence:
        """Give the TPM's public keys; raises ``AttestorFailed``."""
        content = await self._in_time(self._evidence)
        self._asked = True
        return Evidence(NAME, _message(content))

    async def respond(self, challenge: bytes) -> bytes:
        """Have the TPM open the one credential that follows the evidence; raises ``AttestorFailed``."""
        asked, self._asked = self._asked, False
        if not asked:
            raise AttestorFailed("the server challenged without evidence, or twice")
        try:
            content = members(read(challenge), _BLOB, _SEED)
            blob, seed = (octets(content[name], MAX_CREDENTIAL) for name in (_BLOB, _SEED))
        except InvalidJson as error:
            raise AttestorFailed(f"the server's challenge: {error.message}") from None
        return _message({_SECRET: await self._in_time(lambda: self._tpm.activate(blob, seed))})

    async def _in_time(self, work: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(TPM_TIMEOUT):
                return await self._reads.run(0, lambda _: work())
        except TimeoutError:
            raise AttestorFailed("the TPM did not answer in time", code="tpm_timeout") from None

    def _evidence(self) -> Mapping[str, bytes]:
        keys = self._tpm.keys()
        path = self._settings.ek_certificate_path
        certificate = keys.ek_certificate if path is None else read_certificate(path)
        if certificate is None:
            return {_PUBLIC: keys.ek_public, _AK: keys.ak_public}
        try:
            certified = _spki(x509.load_der_x509_certificate(certificate).public_key())
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
            raise AttestorFailed(
                "the endorsement key's certificate cannot be read",
                code="ek_certificate_malformed",
                hint="name a readable one in ek_certificate_path",
            ) from None
        if certified != keys.ek_public:
            raise AttestorFailed(
                "the certificate is not the endorsement key's", code="ek_certificate_key", hint="check ek"
            )
        return {_CERTIFICATE: certificate, _AK: keys.ak_public}


@dataclass(frozen=True, slots=True)
class _Claim:
    """What the node sent, each thing once; nothing of it is proven."""

    key: EndorsementKey
    certificate: x509.Certificate | None
    ak: AttestationKey


@dataclass(frozen=True, slots=True)
class _Known:
    """A TPM that counts, if the node has it."""

    claim: _Claim
    pub_hash: str
    authority: x509.Certificate | None


class TpmServer:
    """The server's half: judges the endorsement key, then has the TPM prove that it is there."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = TpmServerSettings

    def __init__(self, settings: TpmServerSettings, clock: Clock | None = None) -> None:
        """Read the authorities; raises Misconfigured where there is none, or one may not sign."""
        self._settings = settings
        self._clock = clock or SystemClock()
        self._anchors = TrustAnchors(() if settings.ca_path is None else read_authorities(settings.ca_path))
        if settings.hash_path is not None and not settings.hash_path.is_dir():
            raise Misconfigured(f"hash_path {settings.hash_path} is no directory")

    async def verify(self, evidence: Evidence, challenge_with: ChallengeWith) -> AttestedNode:
        """Judge the keys, then have the TPM open a credential; raises ``NotAttested``, or ``Unavailable`` for ``hash_path``."""
        known = await asyncio.to_thread(self._judge, evidence.payload)
        # NOTE(security): made here and kept nowhere, so it is this attestation's alone.
        secret = secrets.token_bytes(SECRET)
        credential = make_credential(known.claim.key, known.claim.ak.name, secret)
        response = await challenge_with(_message({_BLOB: credential.blob, _SEED: credential.encrypted_seed}))
        if not hmac.compare_digest(_secret(response), secret):
            raise NotAttested("the node did not prove that it has the TPM", code="possession_not_proven")
        return AttestedNode(path=f"/{NAME}/{known.pub_hash}", selectors=_selectors(known), reattestable=True)

    def _judge(self, payload: bytes) -> _Known:
        claim = _claim(payload)
        pub_hash = claim.key.pub_hash()
        listed = self._listed(pub_hash)
        authority, refusal = None, None
        try:
            authority = self._vouching(claim)
        except InvalidSvid as error:
            refusal = error
        enough = all if self._settings.accept == "both" else any
        if enough((listed, authority is not None)):
            return _Known(claim, pub_hash, authority)
        hint = f"its hash is {pub_hash}"
        if refusal is not None:
            code = f"ek_certificate_{refusal.reason.removeprefix('svid_')}"
            raise NotAttested(f"the endorsement key's certificate: {refusal.message}", code=code, hint=hint)
        raise NotAttested("the TPM is not listed in hash_path", code="ek_not_listed", hint=hint)

    def _listed(self, pub_hash: str) -> bool:
        # Looked up each time: a new node needs no restart, and one that was struck off is out.
        path = self._settings.hash_path
        try:
            return path is not None and (path / pub_hash).is_file()
        except OSError as error:
            raise Unavailable(f"hash_path cannot be read: {error.strerror}") from None

    def _vouching(self, claim: _Claim) -> x509.Certificate | None:
        if self._settings.ca_path is None:
            return None
        if claim.certificate is None:
            raise InvalidSvid("the node has none", code="svid_missing")
        facts = certificates.read(claim.certificate)
        _check_purpose(facts)
        try:
            return find_path(facts, (), self._anchors, now=self._clock.now())[1]
        except InvalidSvid as error:
            if error.reason != "svid_untrusted":
                raise
            raise InvalidSvid("no authority of ca_path vouches for it", code=error.reason) from None


def _claim(payload: bytes) -> _Claim:
    try:
        value = read(payload)
        # One of both, never both: of two keys, one could be judged and the other used.
        kind = _CERTIFICATE if isinstance(value, dict) and _CERTIFICATE in value else _PUBLIC
        content = members(value, kind, _AK)
        ek, ak = octets(content[kind], MAX_EK), octets(content[_AK], MAX_PUBLIC)
    except InvalidJson as error:
        raise NotAttested(f"the evidence: {error.message}", code="evidence_malformed") from None
    certificate = None
    try:
        if kind == _CERTIFICATE:
            certificate = certificates.load(ek)
            key = EndorsementKey.of(certificate.public_key())
        else:
            key = EndorsementKey.of(load_der_public_key(ek))
    except (ValueError, UnsupportedAlgorithm, InvalidSvid):
        raise NotAttested("the endorsement key cannot be read", code="evidence_malformed") from None
    if certificate is None and _spki(key.key) != ek:
        raise NotAttested("the endorsement key is not in its one DER form", code="evidence_malformed")
    return _Claim(key, certificate, read_attestation_key(ak))


def _check_purpose(facts: Facts) -> None:
    """Refuse what a maker's authority signs beside certificates of endorsement keys (EK Credential Profile §3.5)."""
    if facts.is_ca:
        raise InvalidSvid("it is an authority's own", code="svid_leaf_is_ca")
    if facts.purposes is not None and _EK_PURPOSE not in facts.purposes:
        raise InvalidSvid("it is for another purpose than an endorsement key", code="svid_extended_key_usage")
    usage = facts.key_usage
    if usage is not None and not (usage.key_encipherment or usage.key_agreement):
        raise InvalidSvid("its key usage has neither keyEncipherment nor keyAgreement", code="svid_key_usage")


def _secret(response: bytes) -> bytes:
    try:
        return octets(members(read(response), _SECRET)[_SECRET], SECRET)
    except InvalidJson as error:
        raise NotAttested(f"the response: {error.message}", code="evidence_malformed") from None


def _selectors(known: _Known) -> frozenset[Selector]:
    values = [f"pub_hash:{known.pub_hash}"]
    if known.authority is not None:
        values.append(f"ca_hash:{hashlib.sha256(known.authority.public_bytes(Encoding.DER)).hexdigest()}")
        names = [one.value for one in known.authority.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        # Of two names nobody can say which one is meant.
        values += [f"issuer:cn:{name}" for name in names if len(names) == 1 and isinstance(name, str) and name]
    return frozenset(filter(None, map(_selector, values)))


def _selector(value: str) -> Selector | None:
    try:
        return Selector.of(NAME, value)
    except InvalidSelector:
        # Control characters and the like: no entry can ask for it, and to have fewer gives a node nothing more.
        return None


def _spki(key: object) -> bytes:
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise TypeError("another kind of key")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _message(content: Mapping[str, bytes]) -> bytes:
    return json.dumps({name: text(value) for name, value in content.items()}).encode()
