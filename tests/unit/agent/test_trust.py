"""Reading the first trust."""

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from broker.agent.trust import read_trust_bundle
from broker.errors import Misconfigured
from tests.fakes.fake_server import TD, FakeCa


def test_pem_and_spiffe_json(tmp_path) -> None:
    ca, other = FakeCa(), FakeCa()
    path = tmp_path / "bundle"
    path.write_bytes(ca.root.public_bytes(Encoding.PEM) + other.root.public_bytes(Encoding.PEM))
    assert read_trust_bundle(path, TD).x509_authorities == (ca.root, other.root)
    path.write_text("\n" + ca.bundle.to_json())
    assert read_trust_bundle(path, TD).jwt_authorities.keys() == {ca.kid}


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b'{"keys":[]}', b"{", b"-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n"]
)
def test_refused(tmp_path, content) -> None:
    path = tmp_path / "bundle"
    path.write_bytes(content)
    with pytest.raises(Misconfigured, match="trust_bundle_path"):
        read_trust_bundle(path, TD)
    with pytest.raises(Misconfigured, match="cannot be read"):
        read_trust_bundle(tmp_path / "none", TD)
