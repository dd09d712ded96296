"""Nodes that prove themselves by a real TPM in software, before the real server."""

import hashlib
import shutil
import tempfile
from pathlib import Path

import pytest

from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.types import spiffeid_pb2
from broker.attestation.tpm_device import TpmDevice
from tests.fakes.node_fleet import Fleet, ids, refused
from tests.fakes.running_agent import ME
from tests.fakes.swtpm import Swtpm, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture
def fleet():
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    yield Fleet(directory)
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def swtpm():
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    one = Swtpm(directory)
    one.manufacture()
    with one.running():
        yield one
    shutil.rmtree(directory)


def certified(swtpm: Swtpm) -> str:
    return f"[server.attestors.node.tpm]\nca_path = '{swtpm.authority}'\n"


def node(swtpm: Swtpm, kind: str = "rsa-2048") -> str:
    return f"[agent.attestors.node.tpm]\ntcti = '{swtpm.tcti}'\nek = '{kind}'\n"


def pub_hash(swtpm: Swtpm, kind: str = "rsa-2048") -> str:
    return hashlib.sha256(TpmDevice(swtpm.tcti, kind).keys().ek_public).hexdigest()


@pytest.mark.parametrize("kind", ["rsa-2048", "ecc-p384"])
async def test_a_node_joins_by_its_tpm_and_its_selectors_count(fleet, swtpm, kind) -> None:
    name = pub_hash(swtpm, kind)
    async with fleet.server(certified(swtpm)), fleet.agent("a", node(swtpm, kind)) as agent:
        (path,) = await fleet.known()
        assert path == f"/spire/agent/tpm/{name}"
        assert str(agent.agent.node.id) == f"spiffe://example.org{path}"
        await fleet.register("/fleet", "/spire/server", f"tpm:pub_hash:{name}", "tpm:issuer:cn:swtpm-localca")
        await fleet.register("/wl", "/fleet", ME)
        assert await ids(agent) == ["spiffe://example.org/wl"]


async def test_it_attests_again_to_renew_and_after_it_lost_everything(fleet, swtpm) -> None:
    async with fleet.server(certified(swtpm)):
        async with fleet.agent("a", node(swtpm)) as agent:
            own = agent.agent.node
            first, before = own.id, own.tls.chain_der
            await own.renew(agent.agent.upstream)
            assert own.id == first
            assert own.tls.chain_der != before
            (known,) = (await fleet.known()).values()
            assert (known.attestation_type, known.can_reattest) == ("tpm", True)
        shutil.rmtree(fleet.directory / "a")
        async with fleet.agent("a", node(swtpm)) as agent:
            assert agent.agent.node.id == first


async def test_a_listed_tpm_without_a_certificate(fleet, swtpm) -> None:
    listed = fleet.directory / "hashes"
    listed.mkdir()
    async with fleet.server(f"[server.attestors.node.tpm]\nhash_path = '{listed}'\n"):
        assert await refused(fleet, "a", node(swtpm, "ecc-p256")) == "ek_not_listed"
        name = pub_hash(swtpm, "ecc-p256")
        (listed / name).touch()
        async with fleet.agent("a", node(swtpm, "ecc-p256")) as agent:
            assert agent.agent.node.id.path == f"/spire/agent/tpm/{name}"


async def test_who_does_not_come_in(fleet, swtpm) -> None:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        stranger = Swtpm(directory)
        stranger.manufacture()
        async with fleet.server(certified(swtpm)):
            with stranger.running():
                assert await refused(fleet, "b", node(stranger)) == "ek_certificate_untrusted"
            assert await refused(fleet, "b", node(stranger)) == "tpm_unavailable"
            assert await refused(fleet, "b", node(swtpm, "ecc-p256")) == "ek_certificate_missing"
            async with fleet.agent("a", node(swtpm)):
                (path,) = await fleet.known()
            await fleet.admin.BanAgent(
                agent_pb2.BanAgentRequest(id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=path))
            )
            shutil.rmtree(fleet.directory / "a")
            assert await refused(fleet, "a", node(swtpm)) == "agent_banned"
    finally:
        shutil.rmtree(directory)
