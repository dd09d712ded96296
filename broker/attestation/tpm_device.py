"""The agent's own TPM 2.0: what it is asked while a node attests. Every call blocks, for seconds on slow hardware.

Nothing is kept between two calls, in the TPM or on disk: the attestation key is a primary key of the endorsement
hierarchy, which the TPM derives anew, and each time the same, from a seed that never leaves it. The library, tpm2-pytss,
is an extra and loaded on first need. What is done with the answers is not known here.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias

from broker.attestation.contract import AttestorFailed
from broker.errors import Misconfigured

MAX_CERTIFICATE: Final = 8 * 1024
"""Bytes of an endorsement key's certificate: some have 1.5 KiB, and a TPM's whole memory holds little more."""

Kind: TypeAlias = Literal["rsa-2048", "ecc-p256", "ecc-p384", "rsa-3072"]


class _Place(NamedTuple):
    """Where TCG keeps an endorsement key: its template, the handle it may have, the index of its certificate."""

    template: str
    handle: int
    nv_index: int


_PLACES: Final[dict[Kind, _Place]] = {
    # EK Credential Profile §2.2.1.4, §2.2.1.5; Registry of Reserved TPM 2.0 Handles §2.2
    "rsa-2048": _Place("EK-RSA2048", 0x81010001, 0x01C00002),
    "ecc-p256": _Place("EK-ECC256", 0x81010002, 0x01C0000A),
    "ecc-p384": _Place("EK-HIGH-ECC384", 0x81010016, 0x01C00016),
    "rsa-3072": _Place("EK-HIGH-RSA3072", 0x8101001C, 0x01C0001C),
}
_CHUNK: Final = 512  # bytes of one read of NV memory, which every TPM allows
_AK: Final = "ecc256:ecdsa-sha256:null"
_AK_ATTRIBUTES: Final = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|sign"


@dataclass(frozen=True, slots=True)
class TpmKeys:
    """The public halves of a TPM's endorsement key and attestation key."""

    ek_public: bytes
    """SubjectPublicKeyInfo, DER."""
    ek_certificate: bytes | None
    """As the TPM keeps it, DER; None where it has none."""
    ak_public: bytes
    """TPM2B_PUBLIC."""


class Tpm(Protocol):
    """What an attesting node asks of its TPM."""

    def keys(self) -> TpmKeys:
        """Give its public keys; raises AttestorFailed."""
        ...

    def activate(self, blob: bytes, encrypted_seed: bytes) -> bytes:
        """Open a credential that was made for these keys; raises AttestorFailed."""
        ...


class TpmDevice:
    """One TPM, named by its TCTI, such as ``device:/dev/tpmrm0``, and one of its endorsement keys."""

    def __init__(self, tcti: str, kind: Kind) -> None:
        """Load the library; raises Misconfigured where it is missing."""
        self._tcti, self._place = tcti, _PLACES[kind]
        try:
            self._tss: Any = importlib.import_module("tpm2_pytss")
            self._utils: Any = importlib.import_module("tpm2_pytss.utils")
        except ImportError as error:
            raise Misconfigured(
                f"the library for TPMs cannot be loaded: {error}",
                code="tpm_library",
                hint="pip install 'identity-broker[tpm]'; building it needs Debian's libtss2-dev, pkg-config and gcc",
            ) from None

    def keys(self) -> TpmKeys:
        """Read or derive the public keys; raises AttestorFailed."""
        with self._opened() as tpm:
            certificate, template = self._template(tpm)
            with self._endorsement_key(tpm, template) as (_, public):
                ek = public.to_der()
            with self._attestation_key(tpm) as (_, public):
                return TpmKeys(ek, _trimmed(certificate) or None, public.marshal())

    def activate(self, blob: bytes, encrypted_seed: bytes) -> bytes:
        """Open a credential that was made for these keys (TPM2_ActivateCredential); raises AttestorFailed."""
        tss = self._tss
        with self._opened() as tpm:
            try:
                credential, rest = tss.TPM2B_ID_OBJECT.unmarshal(blob)
                seed, more = tss.TPM2B_ENCRYPTED_SECRET.unmarshal(encrypted_seed)
            except tss.TSS2_Exception:
                raise AttestorFailed("the server's challenge is no credential of a TPM") from None
            if rest != len(blob) or more != len(encrypted_seed):
                raise AttestorFailed("the server's challenge is no credential of a TPM")
            _, template = self._template(tpm)
            with (
                self._endorsement_key(tpm, template) as (ek, public),
                self._attestation_key(tpm) as (ak, _),
                self._authorised(tpm, public) as session,
            ):
                return bytes(tpm.activate_credential(ak, ek, credential, seed, session2=session))

    # ---- parts

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            tpm = self._tss.ESAPI(self._tcti)
        except self._tss.TSS2_Exception as error:
            raise AttestorFailed(
                f"the TPM cannot be reached: {error}",
                code="tpm_unavailable",
                hint="check tcti; the agent needs to read and write the device, /dev/tpmrm0 as a rule",
            ) from None
        try:
            yield tpm
        except self._tss.TSS2_Exception as error:
            raise AttestorFailed(
                f"the TPM refused: {error}",
                code="tpm_failed",
                hint="the endorsement hierarchy must be enabled, and have no password",
            ) from None
        finally:
            tpm.close()

    def _template(self, tpm: Any) -> tuple[bytes, Any]:
        def read(index: int) -> bytes:
            if self._exists(tpm, index):
                return self._nv(tpm, index)
            if index == self._place.nv_index:
                return b""  # no certificate is no error: the key may be listed
            raise self._utils.NoSuchIndex(index)

        certificate, template = self._utils.create_ek_template(self._place.template, read)
        return certificate, template

    def _exists(self, tpm: Any, handle: int) -> bool:
        # Asked for in this way, a missing handle is no error, and the library does not complain in the agent's log.
        _, found = tpm.get_capability(self._tss.TPM2_CAP.HANDLES, handle, 1)
        return any(one == handle for one in found.data.handles)

    def _nv(self, tpm: Any, index: int) -> bytes:
        handle = tpm.tr_from_tpmpublic(index)
        size = tpm.nv_read_public(handle)[0].nvPublic.dataSize
        if size > MAX_CERTIFICATE:
            raise AttestorFailed("the TPM's certificate is too large", code="tpm_failed")
        return b"".join(
            bytes(tpm.nv_read(handle, min(_CHUNK, size - start), start)) for start in range(0, size, _CHUNK)
        )

    @contextmanager
    def _endorsement_key(self, tpm: Any, template: Any) -> Iterator[tuple[Any, Any]]:
        if self._exists(tpm, self._place.handle):
            handle = tpm.tr_from_tpmpublic(self._place.handle)
            public = tpm.read_public(handle)[0]
            if self._same_kind(public.publicArea, template.publicArea):
                yield handle, public
                return
        with self._primary(tpm, template) as made:
            yield made

    def _same_kind(self, one: Any, other: Any) -> bool:
        """Tell whether a key at the usual handle is what the template would make, so that it need not be made."""
        if (one.type, one.nameAlg, one.objectAttributes) != (other.type, other.nameAlg, other.objectAttributes):
            return False
        ours, theirs = one.parameters, other.parameters
        if ours.asymDetail.symmetric.keyBits.sym != theirs.asymDetail.symmetric.keyBits.sym:
            return False
        if one.type == self._tss.TPM2_ALG.RSA:
            return bool(ours.rsaDetail.keyBits == theirs.rsaDetail.keyBits)
        return bool(ours.eccDetail.curveID == theirs.eccDetail.curveID)

    @contextmanager
    def _attestation_key(self, tpm: Any) -> Iterator[tuple[Any, Any]]:
        tss = self._tss
        attributes = tss.TPMA_OBJECT.parse(_AK_ATTRIBUTES)
        template = tss.TPM2B_PUBLIC.parse(_AK, objectAttributes=attributes, nameAlg=tss.TPM2_ALG.SHA256)
        with self._primary(tpm, template) as made:
            yield made

    @contextmanager
    def _primary(self, tpm: Any, template: Any) -> Iterator[tuple[Any, Any]]:
        handle, public, *_ = tpm.create_primary(None, template, self._tss.ESYS_TR.ENDORSEMENT)
        try:
            yield handle, public
        finally:
            tpm.flush_context(handle)

    @contextmanager
    def _authorised(self, tpm: Any, public: Any) -> Iterator[Any]:
        """Give what authorises the use of the endorsement key: its empty password, or else its policy (profile §B.6)."""
        tss = self._tss
        if public.publicArea.objectAttributes & tss.TPMA_OBJECT.USERWITHAUTH:
            yield tss.ESYS_TR.PASSWORD
            return
        nobody = tss.ESYS_TR.NONE
        plain = tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.NULL)
        session = tpm.start_auth_session(nobody, nobody, tss.TPM2_SE.POLICY, plain, public.publicArea.nameAlg)
        try:
            tpm.policy_secret(tss.ESYS_TR.ENDORSEMENT, session)
            yield session
        finally:
            tpm.flush_context(session)


def _trimmed(certificate: bytes) -> bytes:
    """Cut off what fills up the TPM's memory behind a certificate (X.690 §8.1.3)."""
    if certificate[:2] == b"\x30\x82":
        return certificate[: 4 + int.from_bytes(certificate[2:4])]
    return certificate
