import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from broker.errors import Invalid
from broker.server.authority.csr import MAX_REQUEST, requested_key, requested_names

KEY = ec.generate_private_key(ec.SECP256R1())


def request(key=KEY, digest=hashes.SHA256(), names=()):  # noqa: B008
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        uris = [x509.UniformResourceIdentifier(name) for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(uris), critical=False)
    return builder.sign(key, digest).public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    "key",
    [KEY, ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)],
    ids=["P-256", "P-384", "RSA of 2,048 bits"],
)
def test_strong_keys_are_taken(key):
    assert requested_key(request(key)) == key.public_key()


@pytest.mark.bears("I04")
@pytest.mark.parametrize(
    ("der", "code"),
    [
        (b"", "csr_size"),
        (b"0" * (MAX_REQUEST + 1), "csr_size"),
        (b"\x00" * (1 << 20), "csr_size"),
        (b"nonsense", "csr_malformed"),
        (request(rsa.generate_private_key(65537, 1024)), "csr_key"),
        (request(ec.generate_private_key(ec.SECP224R1())), "csr_key"),
        (request(ed25519.Ed25519PrivateKey.generate(), None), "csr_key"),
    ],
)
def test_others_are_refused(der, code):
    with pytest.raises(Invalid) as caught:
        requested_key(der)
    assert caught.value.reason == code


@pytest.mark.bears("I04")
@pytest.mark.parametrize("key", [KEY, rsa.generate_private_key(65537, 2048)], ids=["ec", "rsa"])
def test_the_sender_must_hold_the_key(key):
    der = bytearray(request(key))
    der[-3] ^= 1
    with pytest.raises(Invalid) as caught:
        requested_key(bytes(der))
    assert caught.value.reason == "csr_signature"


def test_an_operators_request_names_one_id():
    wishes = requested_names(request(names=("spiffe://example.org/a",)))
    assert str(wishes.spiffe_id) == "spiffe://example.org/a"
    assert wishes.dns_names == ()
    for names in ((), ("spiffe://example.org/a", "spiffe://example.org/b"), ("https://example.org",)):
        with pytest.raises(Invalid):
            requested_names(request(names=names))
