"""X.509-SVIDs a second and core, through the server's own door."""

import secrets
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker._proto.spire.api.server.svid.v1 import svid_pb2
from tests.bench.fleet import LightAgent, light_agent
from tests.bench.house import House
from tests.bench.measure import Item, at_least, cpu_seconds, rate

BATCH = 250
ROUNDS = 3
SHARE = 0.40


async def x509_svids(house: House, seconds: float) -> list[Item]:
    """Sign batches for an attested agent; what counts is the server's processor time, the client's is its own."""
    token, bare = await house.join_token(), Bare()
    async with light_agent(house.address, house.bundle(), token, house.directory / "signing") as agent:
        ids = await house.register(agent.id, [f"/bench/signed/{number}" for number in range(BATCH)])
        request = svid_pb2.BatchNewX509SVIDRequest(
            params=[svid_pb2.NewX509SVIDParams(entry_id=entry_id, csr=_csr()) for entry_id in ids]
        )
        await _batch(agent, request)
        values, limits = [], []
        for _ in range(ROUNDS):
            limits.append(rate(bare.sign, seconds=seconds / ROUNDS / 4))
            values.append(await _signed_per_core(house, agent, request, seconds / ROUNDS))
    return [at_least("x509_svids_signed_per_core", max(values), "1/s", max(limits), SHARE)]


async def _signed_per_core(
    house: House, agent: LightAgent, request: svid_pb2.BatchNewX509SVIDRequest, seconds: float
) -> float:
    pid, signed = house.pid("server"), 0
    before = cpu_seconds(pid)
    while (used := cpu_seconds(pid) - before) < seconds * 0.75:
        signed += await _batch(agent, request)
    return signed / used


async def _batch(agent: LightAgent, request: svid_pb2.BatchNewX509SVIDRequest) -> int:
    answer = await agent.upstream.svid.BatchNewX509SVID(request, timeout=30)
    if any(one.status.code for one in answer.results):
        raise RuntimeError("an SVID was not signed")
    return len(answer.results)


def _csr() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return csr.public_bytes(Encoding.DER)


class Bare:
    """A leaf of the same profile, built and signed by ``cryptography`` alone."""

    def __init__(self) -> None:
        self._key, subject = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        self._subject = subject.public_key()
        self._name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "bench")])
        self._from = datetime.now(UTC).replace(microsecond=0)

    def sign(self) -> bytes:
        issuer = self._key.public_key()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._subject)
            .serial_number(secrets.randbits(127))
            .not_valid_before(self._from)
            .not_valid_after(self._from + timedelta(hours=1))
            .add_extension(_USAGE, critical=True)
            .add_extension(_EXTENDED, critical=False)
            .add_extension(_NOT_CA, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._subject), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
            .add_extension(_NAMES, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(Encoding.DER)


_USAGE = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
_EXTENDED = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
_NOT_CA = x509.BasicConstraints(ca=False, path_length=None)
_NAMES = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://dev.test/bench/signed/1")])
