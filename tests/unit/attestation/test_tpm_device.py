"""A TPM as the agent asks it, with a real one in software; and what is said where there is none."""

import importlib
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from attestors.node.tpm import TpmAgent, TpmSettings
from broker.attestation import tpm_credential
from broker.attestation.contract import AttestorFailed
from broker.attestation.tpm_credential import Credential, EndorsementKey, make_credential
from broker.attestation.tpm_device import TpmDevice
from broker.attestation.tpm_public import read_attestation_key
from broker.errors import Misconfigured
from tests.fakes.swtpm import Swtpm, why_not

SECRET = bytes(range(32))
REASON = why_not()
tpm_here = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture(scope="module")
def made():
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    one = Swtpm(directory)
    one.manufacture()
    yield one
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def swtpm(made):
    with made.running():
        yield made


def credential(device: TpmDevice, secret: bytes = SECRET, name: bytes | None = None) -> Credential:
    keys = device.keys()
    ek = EndorsementKey.of(load_der_public_key(keys.ek_public))
    return make_credential(ek, name or read_attestation_key(keys.ak_public).name, secret)


@tpm_here
@pytest.mark.parametrize(
    ("kind", "certified"), [("rsa-2048", True), ("ecc-p384", True), ("ecc-p256", False), ("rsa-3072", False)]
)
def test_a_real_tpm_opens_what_was_made_for_it(swtpm, kind, certified) -> None:
    device = TpmDevice(swtpm.tcti, kind)
    keys = device.keys()
    assert (keys.ek_certificate is not None) is certified
    if keys.ek_certificate is not None:
        leaf = x509.load_der_x509_certificate(keys.ek_certificate)
        assert leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == keys.ek_public
    made = credential(device)
    assert device.activate(made.blob, made.encrypted_seed) == SECRET
    # Nothing was left behind in the TPM, which has three places, and the keys are the same.
    for _ in range(4):
        assert device.keys() == keys


@contextmanager
def persistent(swtpm: Swtpm, handle: int, template, hierarchy: str):
    """Lay a key at a handle, as an operator or an installer does."""
    tss = importlib.import_module("tpm2_pytss")
    with tss.ESAPI(swtpm.tcti) as tpm:
        made, *_ = tpm.create_primary(None, template, getattr(tss.ESYS_TR, hierarchy))
        tpm.evict_control(tss.ESYS_TR.OWNER, made, handle)
        tpm.flush_context(made)
    yield
    with tss.ESAPI(swtpm.tcti) as tpm:
        kept = tpm.tr_from_tpmpublic(handle)
        tpm.evict_control(tss.ESYS_TR.OWNER, kept, handle)


@tpm_here
def test_a_key_at_the_usual_handle_counts_if_it_is_of_the_kind(swtpm) -> None:
    device = TpmDevice(swtpm.tcti, "ecc-p256")
    derived = device.keys()
    good = importlib.import_module("tpm2_pytss.internal.templates").ek_template.lookup("EK-ECC256").template
    for template in ("ecc256", "rsa2048"):
        with persistent(swtpm, 0x81010002, template, "OWNER"):
            assert device.keys() == derived
    with persistent(swtpm, 0x81010002, good, "ENDORSEMENT"):
        assert device.keys() == derived
        made = credential(device)
        assert device.activate(made.blob, made.encrypted_seed) == SECRET
    with persistent(swtpm, 0x81010002, good, "OWNER"):
        # Of the kind, and another key: it is used, as it lies where the endorsement key belongs.
        assert device.keys().ek_public != derived.ek_public


@tpm_here
@pytest.mark.parametrize("kind", ["ecc-p256", "ecc-p384"])
def test_coordinates_with_leading_zeros(swtpm, kind) -> None:
    device = TpmDevice(swtpm.tcti, kind)
    keys = device.keys()
    ek = EndorsementKey.of(load_der_public_key(keys.ek_public))
    name, width = read_attestation_key(keys.ak_public).name, ek.key.curve.key_size // 8

    def leads(own) -> tuple[bool, bool]:
        x = own.public_key().public_numbers().x.to_bytes(width)
        return x[0] == 0, own.exchange(ec.ECDH(), ek.key)[0] == 0

    for wanted in ((True, False), (False, True)):
        own = next(one for _ in range(50_000) if leads(one := ec.generate_private_key(ek.key.curve)) == wanted)
        seed, sent = tpm_credential._ecc_seed(ek.key, own, ek.suite)
        blob = tpm_credential._sized(tpm_credential._protected(ek.suite, seed, name, SECRET))
        assert device.activate(blob, tpm_credential._sized(sent)) == SECRET


@tpm_here
@pytest.mark.parametrize("kind", ["rsa-2048", "ecc-p256"])
def test_what_a_real_tpm_does_not_open(swtpm, kind) -> None:
    device = TpmDevice(swtpm.tcti, kind)
    good, other = credential(device), credential(device)
    foreign = credential(device, name=b"\x00\x0b" + bytes(32))
    for blob, seed in (
        (good.blob, other.encrypted_seed),
        (good.blob[:-1] + bytes([good.blob[-1] ^ 1]), good.encrypted_seed),
        (foreign.blob, foreign.encrypted_seed),
        (b"", b""),
        (good.blob + b"\0", good.encrypted_seed),
        (good.blob[:-1], good.encrypted_seed),
        (good.blob, good.encrypted_seed + b"\0"),
    ):
        with pytest.raises(AttestorFailed):
            device.activate(blob, seed)
    assert device.activate(good.blob, good.encrypted_seed) == SECRET


@tpm_here
def test_the_same_keys_after_the_power_was_off(made) -> None:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        one = Swtpm(directory)
        shutil.copytree(made.directory / "state", directory / "state")
        seen = []
        for _ in range(2):
            with one.running():
                seen.append(TpmDevice(one.tcti, "ecc-p384").keys())
        assert seen[0] == seen[1]
    finally:
        shutil.rmtree(directory)


@tpm_here
def test_a_tpm_that_is_not_there(tmp_path) -> None:
    for tcti in (f"swtpm:path={tmp_path}/none", f"device:{tmp_path}/none", "nonsense:x"):
        with pytest.raises(AttestorFailed) as why:
            TpmDevice(tcti, "rsa-2048").keys()
        assert why.value.reason == "tpm_unavailable"


def test_without_the_library(monkeypatch) -> None:
    real = importlib.import_module

    def missing(name: str, package=None):
        if name.startswith("tpm2_pytss"):
            raise ModuleNotFoundError("No module named 'tpm2_pytss'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(Misconfigured) as why:
        TpmAgent(TpmSettings())
    assert why.value.reason == "tpm_library" and "identity-broker[tpm]" in why.value.hint
