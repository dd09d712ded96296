"""Which certificates go into which file, which identity is taken, and what probes are told: the agent's answers as they come."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker._proto.spiffe import workload_pb2
from broker.cli.credential_files import CredentialDirectory
from broker.cli.svid_keeping import X509, Keeping, Wanted
from broker.errors import InvalidSvid, NoIdentity, Unavailable
from broker.spiffe import SpiffeId, TrustDomain
from tests.fakes.fake_server import FakeCa
from tests.fakes.running_agent import estate

NAME = "spiffe://example.org/wl"
ROOT = FakeCa()


def svid(ca: FakeCa = ROOT, *, hint: str = "", spiffe_id: str = NAME, above: bytes = b"") -> workload_pb2.X509SVID:
    made = ca.identity(SpiffeId(spiffe_id))
    key = made.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return workload_pb2.X509SVID(
        spiffe_id=spiffe_id, x509_svid=made.chain_der[0] + above, x509_svid_key=key, bundle=der(ca), hint=hint
    )


def der(ca: FakeCa) -> bytes:
    return ca.root.public_bytes(Encoding.DER)


def keeping(wanted: Wanted, directory: CredentialDirectory | None = None, said: list[str] | None = None) -> Keeping:
    async def changed(part: str) -> None:
        (said if said is not None else []).append(part)

    channel = grpc.aio.insecure_channel("unix:/nonexistent")
    return Keeping(channel, wanted, directory, ROOT.clock, changed=changed, say=print, timeout=10)  # type: ignore[arg-type]


def certificates(content: bytes) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(content)


async def test_what_stands_above_the_leaf_goes_where_it_is_wanted() -> None:
    middle = FakeCa()
    message = workload_pb2.X509SVIDResponse(svids=[svid(above=der(middle))])
    files, until = keeping(Wanted())._x509_files(message)
    content = {one.name: one.content for one in files}
    assert next(one.name for one in files) == "svid_key.pem"
    assert certificates(content["svid.pem"])[1:] == [middle.root]
    assert certificates(content["svid_bundle.pem"]) == [ROOT.root]
    assert until == certificates(content["svid.pem"])[0].not_valid_after_utc
    files, _ = keeping(Wanted(add_intermediates_to_bundle=True))._x509_files(message)
    content = {one.name: one.content for one in files}
    assert len(certificates(content["svid.pem"])) == 1
    assert certificates(content["svid_bundle.pem"]) == [ROOT.root, middle.root]


async def test_authorities_of_others_and_expired_ones() -> None:
    other = FakeCa(TrustDomain("other.example"))
    message = workload_pb2.X509SVIDResponse(svids=[svid()], federated_bundles={"spiffe://other.example": der(other)})

    def bundle(wanted: Wanted) -> list[x509.Certificate]:
        return certificates(keeping(wanted)._x509_files(message)[0][2].content)

    assert bundle(Wanted()) == [ROOT.root]
    assert bundle(Wanted(include_federated_domains=True)) == [ROOT.root, other.root]
    assert bundle(Wanted(omit_expired=True)) == [ROOT.root]

    class Later:
        def now(self):
            return ROOT.clock.now() + timedelta(hours=25)

    late = keeping(Wanted(omit_expired=True))
    late._clock = Later()  # type: ignore[assignment]
    with pytest.raises(InvalidSvid, match="every authority"):
        late._x509_files(message)


async def test_the_identity_that_was_chosen_and_no_other() -> None:
    both = [svid(hint="a"), svid(hint="b", spiffe_id=f"{NAME}/b")]
    assert keeping(Wanted())._chosen(both) == both[0]
    assert keeping(Wanted(hint="b"))._chosen(both) == both[1]
    assert keeping(Wanted(spiffe_id=f"{NAME}/b"))._chosen(both) == both[1]
    for wanted in (Wanted(hint="c"), Wanted(spiffe_id=f"{NAME}/c"), Wanted(hint="a", spiffe_id=f"{NAME}/b")):
        with pytest.raises(NoIdentity):
            keeping(wanted)._chosen(both)
    with pytest.raises(Unavailable):
        keeping(Wanted())._chosen([])


async def test_a_key_of_another_certificate_is_not_written() -> None:
    wrong = svid()
    wrong.x509_svid_key = svid().x509_svid_key
    with pytest.raises(InvalidSvid, match="not the certificate's"):
        keeping(Wanted())._x509_files(workload_pb2.X509SVIDResponse(svids=[wrong]))


async def test_the_same_again_is_no_change_and_expiry_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    with CredentialDirectory.opened(tmp_path) as directory:
        made = keeping(Wanted(), directory, said)
        assert made.lacking() == {X509: "it has not been written yet"}
        files, until = made._x509_files(workload_pb2.X509SVIDResponse(svids=[svid()]))
        for _ in range(3):
            await made._put(X509, files, until)
        assert said == [X509]
        assert made.lacking() == {}
        made.state[X509].good_until = ROOT.clock.now()
        assert made.lacking() == {X509: "it has expired"}


@asynccontextmanager
async def kept(directory: Path, wanted: Wanted, said: list[str]) -> AsyncIterator[tuple[Keeping, object]]:
    """Over the real socket of an agent."""
    async with estate() as agent, agent.channel() as channel:
        with CredentialDirectory.opened(directory) as opened:

            async def changed(part: str) -> None:
                said.append(part)

            made = Keeping(channel, wanted, opened, ROOT.clock, changed=changed, say=said.append, timeout=10)
            running = asyncio.create_task(made.run())
            try:
                yield made, agent
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)


async def test_a_directory_that_is_full_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.cli.svid_keeping.WRITE_AGAIN", 0.1)
    said: list[str] = []
    (tmp_path / "svid.pem").mkdir()
    async with kept(tmp_path, Wanted(), said) as (made, _):
        async with asyncio.timeout(30):
            while not made.state[X509].failing:
                await asyncio.sleep(0.02)
            assert "cannot be written to" in made.lacking()[X509]
            (tmp_path / "svid.pem").rmdir()
            while made.lacking():
                await asyncio.sleep(0.02)
        assert sum("trying again" in one for one in said) == 1
        assert said[-1] == X509
