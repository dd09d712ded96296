"""What the Workload API asks of clients, of our own, and that an independent one (PyPI ``spiffe``) is served."""

import asyncio
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker._proto.spiffe import workload_pb2
from broker.errors import BrokerError, Invalid, NoIdentity
from broker.sdk import Workload
from broker.spiffe import TrustDomain
from tests.conformance.house import ONE, SECONDS, TWO, House, Replica
from tests.fakes.svid_pki import Holder
from tests.fakes.workload_api import FakeWorkloadApi

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its generated messages are older than the installed protobuf
    from spiffe import JwtSource, WorkloadApiClient, X509Source
    from spiffe import TrustDomain as TheirTrustDomain

OWN, FOREIGN = "spiffe://dev.test", "spiffe://foreign.test"


@pytest.fixture
def replica() -> Replica:
    return Replica()


@pytest.fixture
async def fake(tmp_path: Path, replica: Replica) -> AsyncIterator[FakeWorkloadApi]:
    async with FakeWorkloadApi(tmp_path / "s") as one:
        one.say(bundles(replica, OWN, FOREIGN))
        yield one


def bundles(replica: Replica, *names: str) -> workload_pb2.X509BundlesResponse:
    return workload_pb2.X509BundlesResponse(bundles=dict.fromkeys(names, replica.root.der))


def svid(replica: Replica, uri: str = ONE, **changes: object) -> workload_pb2.X509SVID:
    leaf: Holder = replica.leaf(uri)
    good: dict[str, object] = {
        "spiffe_id": uri,
        "x509_svid": leaf.der,
        "x509_svid_key": leaf.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        "bundle": replica.root.der,
    }
    return workload_pb2.X509SVID(**(good | changes))


def svids(*held: workload_pb2.X509SVID) -> workload_pb2.X509SVIDResponse:
    return workload_pb2.X509SVIDResponse(svids=held)


async def becomes(me: Workload, spiffe_id: str | None) -> None:
    async with asyncio.timeout(SECONDS):
        while (None if me.current is None else str(me.current.id)) != spiffe_id:
            await asyncio.sleep(0.01)


@pytest.mark.bears("WA-03")
async def test_a_stream_is_kept_open_and_opened_again(fake: FakeWorkloadApi, replica: Replica) -> None:
    fake.say(svids(svid(replica, ONE)))
    async with Workload.connect(fake.address) as me:
        assert str((await me.identity()).id) == ONE
        fake.say(svids(svid(replica, TWO)))
        await becomes(me, TWO)
        assert fake.opened["FetchX509SVID"] == 1
        fake.end(None)  # as an agent does that restarts
        async with asyncio.timeout(SECONDS):
            while fake.opened["FetchX509SVID"] < 2:
                await asyncio.sleep(0.01)
        fake.say(svids(svid(replica, ONE)))
        await becomes(me, ONE)


@pytest.mark.bears("WA-08")
async def test_each_message_replaces_what_was_before(fake: FakeWorkloadApi, replica: Replica) -> None:
    fake.say(svids(svid(replica, ONE, hint="a"), svid(replica, TWO, hint="b")))
    async with Workload.connect(fake.address) as me:
        await me.identity(hint="b")
        assert set(me.bundles) == {TrustDomain("dev.test"), TrustDomain("foreign.test")}
        fake.say(svids(svid(replica, TWO)))
        await becomes(me, TWO)
        # The default value of a field is its new value: the hint is gone, with the identity that had another.
        assert (await me.identity()).hint == ""
        with pytest.raises(NoIdentity):
            await me.identity(hint="a")
        fake.say(bundles(replica, OWN))
        async with asyncio.timeout(SECONDS):
            while set(me.bundles) != {TrustDomain("dev.test")}:
                await asyncio.sleep(0.01)


@pytest.mark.bears("WA-09")
@pytest.mark.parametrize("missing", ["spiffe_id", "x509_svid", "x509_svid_key", "bundle", "svids"])
async def test_a_message_without_what_is_mandatory_is_discarded(
    fake: FakeWorkloadApi, replica: Replica, missing: str
) -> None:
    empty = "" if missing == "spiffe_id" else b""
    bad = svids() if missing == "svids" else svids(svid(replica, TWO, **{missing: empty}))
    async with Workload.connect(fake.address) as me:
        fake.say(bad)
        with pytest.raises(Invalid):
            await me.identity(timeout=SECONDS)
        # The stream goes on, and what was good stays.
        fake.say(svids(svid(replica, ONE)))
        await becomes(me, ONE)
        fake.say(bad)
        fake.say(bundles(replica, OWN))
        async with asyncio.timeout(SECONDS):
            while len(me.bundles) != 1:
                await asyncio.sleep(0.01)
        assert str((await me.identity()).id) == ONE
        assert fake.opened["FetchX509SVID"] == 1


@pytest.mark.bears("WA-09")
@pytest.mark.parametrize(
    "changes",
    [
        {"x509_svid": b"\x30\x03abc"},
        {"x509_svid": b"x"},
        {"x509_svid_key": b"x"},
        {"spiffe_id": TWO},
        {"spiffe_id": "x"},
    ],
    ids=["no certificate", "no DER", "no key", "another identity", "no SPIFFE ID"],
)
async def test_so_is_one_that_cannot_be_read(
    fake: FakeWorkloadApi, replica: Replica, changes: dict[str, object]
) -> None:
    async with Workload.connect(fake.address) as me:
        fake.say(svids(svid(replica, ONE, **changes)))
        with pytest.raises(Invalid):
            await me.identity(timeout=SECONDS)
        fake.say(svids(svid(replica, ONE)))
        await becomes(me, ONE)


@pytest.mark.bears("WA-13")
async def test_of_two_with_one_hint_the_first_counts(fake: FakeWorkloadApi, replica: Replica) -> None:
    fake.say(svids(svid(replica, TWO, hint="same"), svid(replica, ONE, hint="same")))
    async with Workload.connect(fake.address) as me:
        assert str((await me.identity(hint="same")).id) == TWO


@pytest.mark.bears("WA-15")
async def test_what_is_withdrawn_is_used_no_more(fake: FakeWorkloadApi, replica: Replica) -> None:
    fake.say(svids(svid(replica, ONE)))
    async with Workload.connect(fake.address) as me:
        await me.identity()
        fake.end(grpc.StatusCode.PERMISSION_DENIED)
        await becomes(me, None)
        assert not me.bundles
        with pytest.raises(BrokerError):
            await me.identity(timeout=1)


@pytest.mark.bears("WA-15")
async def test_an_agent_that_is_away_withdraws_nothing(fake: FakeWorkloadApi, replica: Replica) -> None:
    fake.say(svids(svid(replica, ONE)))
    async with Workload.connect(fake.address) as me:
        await me.identity()
        fake.end(grpc.StatusCode.UNAVAILABLE)
        async with asyncio.timeout(SECONDS):
            while fake.opened["FetchX509SVID"] < 3:
                await asyncio.sleep(0.01)
        assert str((await me.identity()).id) == ONE


@pytest.mark.bears("WA-22")
async def test_our_client_lets_the_agent_validate(house: House) -> None:
    async with Workload.connect(f"unix://{house.agent_socket}") as me:
        token = await me.jwt_svid("tests")
        validated, claims = await me.validate_jwt_svid(token.token, audience="tests")
        assert (str(validated), claims["aud"]) == (str(token.id), ["tests"])
        with pytest.raises(Invalid):
            await me.validate_jwt_svid(token.token, audience="other")


@pytest.mark.bears("WA-25")
async def test_the_default_identity_is_the_first(house: House) -> None:
    async with Workload.connect(f"unix://{house.agent_socket}") as me:
        assert str((await me.identity()).id) == ONE == str((await me.jwt_svid("tests")).id)
        assert str((await me.identity(hint="external")).id) == TWO


@pytest.mark.bears("WA-01", "WA-16", "WA-19", "WE-05")
def test_an_independent_client(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", f"unix://{house.agent_socket}")
    domain = TheirTrustDomain("dev.test")
    with WorkloadApiClient() as client:
        context = client.fetch_x509_context()
        assert [str(one.spiffe_id) for one in context.x509_svids] == [ONE, TWO]
        assert context.x509_bundle_set.get_bundle_for_trust_domain(domain).x509_authorities
        assert set(client.fetch_jwt_bundles().get_bundle_for_trust_domain(domain).jwt_authorities) == set(
            house.bundles[TrustDomain("dev.test")].jwt_authorities
        )
        token = client.fetch_jwt_svid(audience={"tests"})
        assert str(client.validate_jwt_svid(token.token, audience="tests").spiffe_id) == ONE
        assert [str(one.spiffe_id) for one in client.fetch_jwt_svids(audience={"tests"})] == [ONE, TWO]
    with X509Source() as x509, JwtSource() as jwt:
        assert str(x509.get_x509_context().default_svid.spiffe_id) == ONE
        assert str(jwt.fetch_svid(audience={"tests"}).spiffe_id) == ONE
