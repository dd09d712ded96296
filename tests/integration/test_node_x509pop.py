"""Nodes that prove themselves by certificate, before the real server: both modes, and coming back."""

import shutil
import tempfile
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key

from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.types import spiffeid_pb2
from broker.spiffe.x509svid import split_der
from tests.fakes.node_fleet import NODE, Fleet, ids, refused
from tests.fakes.node_pki import Certified, root
from tests.fakes.running_agent import ME


@pytest.fixture
def fleet():
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    yield Fleet(directory)
    shutil.rmtree(directory)


@pytest.fixture
def authority(fleet) -> Certified:
    made = root()
    (fleet.directory / "ca.pem").write_bytes(made.pem)
    return made


def external(fleet: Fleet, more: str = "") -> str:
    return f"[server.attestors.node.x509pop]\nca_bundle_path = '{fleet.directory}/ca.pem'\n{more}"


async def test_a_node_joins_by_its_certificate_and_its_selectors_count(fleet, authority) -> None:
    middle = authority.authority("Issuing")
    table = fleet.files("a", middle.node("node-1"), middle)
    async with fleet.server(external(fleet)), fleet.agent("a", table) as agent:
        (path,) = await fleet.known()
        assert path.startswith("/spire/agent/x509pop/")
        assert str(agent.agent.node.id) == f"spiffe://example.org{path}"
        await fleet.register("/fleet", "/spire/server", "x509pop:subject:cn:node-1")
        await fleet.register("/wl", "/fleet", ME)
        assert await ids(agent) == ["spiffe://example.org/wl"]


async def test_it_attests_again_to_renew_and_after_it_lost_everything(fleet, authority) -> None:
    table = fleet.files("a", authority.node())
    async with fleet.server(external(fleet)):
        async with fleet.agent("a", table) as agent:
            node = agent.agent.node
            first, before = node.id, node.tls.chain_der
            await node.renew(agent.agent.upstream)
            assert node.id == first
            assert node.tls.chain_der != before
            (known,) = (await fleet.known()).values()
            assert (known.attestation_type, known.can_reattest) == ("x509pop", True)
        shutil.rmtree(fleet.directory / "a")
        async with fleet.agent("a", table) as agent:
            assert agent.agent.node.id == first


async def test_an_operators_path_outlives_the_certificate(fleet, authority) -> None:
    template = "agent_path_template = '{{ .PluginName }}/cn/{{ .Subject.CommonName }}'\n"
    async with fleet.server(external(fleet, template)):
        for _ in range(2):
            async with fleet.agent("a", fleet.files("a", authority.node("node-1"))) as agent:
                assert agent.agent.node.id.path == "/spire/agent/x509pop/cn/node-1"
            shutil.rmtree(fleet.directory / "a")


async def test_who_does_not_come_in(fleet, authority) -> None:
    async with fleet.server(external(fleet)):
        stranger = fleet.files("stranger", root("Stranger").node())
        assert await refused(fleet, "stranger", stranger) == "certificate_untrusted"
        # The server takes the attestors that it was given, and no other.
        token = (await fleet.nodes.create_join_token(ttl=600)).value
        assert await refused(fleet, "token", f"join_token = '{token}'\n") == "attestor_unknown"
        table = fleet.files("a", authority.node())
        async with fleet.agent("a", table):
            (path,) = await fleet.known()
        await fleet.admin.BanAgent(
            agent_pb2.BanAgentRequest(id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=path))
        )
        shutil.rmtree(fleet.directory / "a")
        assert await refused(fleet, "a", table) == "agent_banned"


async def test_an_svid_becomes_a_node(fleet) -> None:
    both = "[server.attestors.node.join_token]\n[server.attestors.node.x509pop]\nmode = 'spiffe'\n"
    async with fleet.server(both):
        token = (await fleet.nodes.create_join_token(ttl=600)).value
        async with fleet.agent("host", f"join_token = '{token}'\n") as host:
            parent = host.agent.node.id.path
            await fleet.register("/spire-exchange/rack/7", parent, ME)
            (given,) = (await host.x509()).svids
        chain = [x509.load_der_x509_certificate(der) for der in split_der(given.x509_svid)]
        key = load_der_private_key(given.x509_svid_key, None)
        (fleet.directory / "k.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (fleet.directory / "c.pem").write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in chain))
        table = NODE.format(key=fleet.directory / "k.pem", chain=fleet.directory / "c.pem")
        async with fleet.agent("guest", table) as guest:
            assert guest.agent.node.id.path == "/spire/agent/x509pop/rack/7"
