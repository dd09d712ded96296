"""What an operator may set for attestation by TPM, and the files that the settings name."""

import pytest
from pydantic import ValidationError

from attestors.node.tpm import TpmServer, TpmServerSettings, TpmSettings
from broker.attestation import certificate_files
from broker.errors import Misconfigured
from tests.unit.attestors.tpm_maker import ISSUER, MAKER, ek_certificate


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accept": "both", "ca_path": "/x"},
        {"accept": "both", "hash_path": "/x"},
        {"accept": "none", "hash_path": "/x"},
        {"hash_paths": "/x"},
    ],
)
def test_settings_of_the_server(settings) -> None:
    with pytest.raises(ValidationError):
        TpmServerSettings(**settings)


@pytest.mark.parametrize("settings", [{"tcti": ""}, {"ek": "rsa-1024"}, {"device": "/dev/tpm0"}])
def test_settings_of_the_agent(settings) -> None:
    with pytest.raises(ValidationError):
        TpmSettings(**settings)


def test_files_that_stop_the_server(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for name, content in {"leaf.pem": ek_certificate().pem, "text": b"x", "half.pem": MAKER.pem[:200]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(content)
    for name in ("empty", "leaf.pem", "text", "half.pem", "missing"):
        with pytest.raises(Misconfigured):
            TpmServer(TpmServerSettings(ca_path=tmp_path / name))
    with pytest.raises(Misconfigured):
        TpmServer(TpmServerSettings(hash_path=tmp_path / "missing"))
    (tmp_path / "large").write_bytes(bytes(certificate_files.MAX_FILE + 1))
    with pytest.raises(Misconfigured):
        TpmServer(TpmServerSettings(ca_path=tmp_path / "large"))


def test_a_directory_as_volumes_leave_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "..data").mkdir()
    (tmp_path / ".keep").touch()
    (tmp_path / "maker.crt").write_bytes(MAKER.der)
    (tmp_path / "bundle.pem").write_bytes(MAKER.pem + ISSUER.pem)
    assert len(certificate_files.read_authorities(tmp_path)) == 3
    monkeypatch.setattr(certificate_files, "MAX_FILES", 1)
    with pytest.raises(Misconfigured):
        certificate_files.read_authorities(tmp_path)
