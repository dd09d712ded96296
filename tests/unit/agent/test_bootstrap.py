"""How the agent gets its own identity, keeps it over restarts, renews it, and loses it."""

import asyncio
import shutil
import tempfile
import threading
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from broker._proto.spiffe import workload_pb2
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.types import x509svid_pb2
from broker.agent import bootstrap as module
from broker.agent.app import Agent
from broker.agent.at_rest import named_key
from broker.agent.identity_file import IdentityFile
from broker.agent.settings import AgentSettings
from broker.attestation.contract import Evidence
from broker.errors import BrokerError, Misconfigured, Refused
from broker.spiffe import SpiffeId, TrustDomain
from broker.transport.dialer import SpiffeDialer
from broker.transport.tls import SvidPeer, TlsPeer
from tests.fakes.fake_server import TD, FakeCa, FakeServer, entry_message
from tests.fakes.running_agent import ME, serving, until
from tests.fakes.sealing import key_file


def stored_identity(directory):
    """What the agent in this directory has on its disk."""
    return IdentityFile(directory / "agent" / "private", named_key(key_file(directory))).load(TD)


@pytest.fixture
def directory():
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(module, "CHECK_EVERY", 0.05)


async def refusal(server: FakeServer, directory: Path, **changed) -> BrokerError:
    """The reason for which an agent does not come up."""
    with pytest.raises((BrokerError, BaseExceptionGroup)) as refused:
        async with serving(server, directory, **changed):
            pass
    error = refused.value
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Seeing(FakeServer):
    """Remembers who called what is for agents."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.seen: set[type[TlsPeer]] = set()

    def _agents_only(self, peer: TlsPeer) -> None:
        self.seen.add(type(peer))
        super()._agents_only(peer)


async def test_nothing_is_begun_on_the_connection_by_which_it_joined(directory, monkeypatch) -> None:
    drop = SpiffeDialer.reconnect

    def drop_later(dialer: SpiffeDialer) -> None:
        # The channel hears of it by way of a socket: sooner or later than others who run.
        asyncio.get_running_loop().call_later(0.1, drop, dialer)

    monkeypatch.setattr(SpiffeDialer, "reconnect", drop_later)
    async with Seeing(directory) as server, serving(server, directory) as running:
        await until(lambda: running.agent.upstream.lost() == 1)
        await until(lambda: running.agent.sync.is_online)
        assert server.seen == {SvidPeer}


async def test_a_restart_needs_no_new_token_and_a_second_agent_does(directory) -> None:
    async with FakeServer(directory) as server:
        server.entries["e1"] = entry_message("e1", "/wl/me", [ME])
        async with serving(server, directory) as first:
            assert str(first.agent.node.id) == "spiffe://example.org/spire/agent/join_token/token-1"
        async with serving(server, directory) as again:
            assert (await again.x509()).svids
        assert server.attestations == ["token-1"]
        error = await refusal(server, directory, runtime_dir=directory / "second")
        assert error.reason == "join_token_unknown"


@pytest.mark.bears("I11")
async def test_a_refused_token_ends_the_start_with_the_servers_words(directory) -> None:
    async with FakeServer(directory) as server:
        error = await refusal(server, directory, join_token="wrong")
        assert isinstance(error, Refused)
        assert "does not exist or has already been used" in error.message


async def test_a_token_that_cannot_be_read_is_a_matter_of_settings(directory) -> None:
    async with FakeServer(directory) as server:
        error = await refusal(server, directory, join_token=None, join_token_file=directory / "none")
        assert isinstance(error, Misconfigured)
        assert (error.reason, server.attestations) == ("attestor_failed", [])
        assert "cannot be read" in error.message
        assert "join_token_file" in error.hint


async def test_without_any_trust_it_does_not_start(directory) -> None:
    settings = AgentSettings(trust_domain=TD, runtime_dir=directory / "agent", join_token="x")
    with pytest.raises(Misconfigured) as refused:
        async with Agent(settings):
            pass
    assert refused.value.reason == "no_trust_bundle"


async def test_a_server_of_another_authority_is_never_told_the_token(directory) -> None:
    async with FakeServer(directory) as server:
        server.trust_file()
        foreign = directory / "foreign.pem"
        async with FakeServer(directory) as other:
            shutil.move(other.trust_file(), foreign)
        async with serving(server, directory, synced=False, trust_bundle_path=foreign) as agent:
            await until(lambda: agent.agent._dialer.last_error is not None)
        assert server.attestations == []


async def test_insecure_bootstrap_takes_the_first_server_and_keeps_to_it(directory) -> None:
    async with FakeServer(directory) as server:
        server.entries["e1"] = entry_message("e1", "/wl/me", [ME])
        async with serving(server, directory, insecure_bootstrap=True) as agent:
            assert (await agent.x509()).svids
            assert agent.agent.node.bundle.x509_authorities == (server.ca.root,)
        port = server.port
    # The same address, another authority: after the first time nothing is believed unseen.
    impostor = FakeServer(directory)
    impostor.port = port
    async with impostor, serving(impostor, directory, insecure_bootstrap=True, synced=False) as agent:
        await until(lambda: agent.agent._dialer.last_error is not None)
        assert agent.agent.node.bundle.x509_authorities == (server.ca.root,)
        assert (impostor.watches, impostor.attestations) == ([], [])


async def test_renewal_at_half_life_with_a_new_key(directory) -> None:
    async with FakeServer(directory) as server:
        server.entries["e1"] = entry_message("e1", "/wl/me", [ME])
        server.agent_ttl = timedelta(seconds=3)
        async with serving(server, directory) as agent:
            before = agent.agent.node.tls
            await until(lambda: server.renewals >= 1)
            server.agent_ttl = timedelta(hours=1)
            await until(lambda: agent.agent.node.tls is not before)
            await agent.agent.node.settle()
            stored = stored_identity(directory)
            assert stored.tls.chain_der == agent.agent.node.tls.chain_der
            assert stored.tls.key.private_numbers() != before.key.private_numbers()
            await until(lambda: agent.agent.sync.is_online)
            assert (await agent.x509()).svids
        assert len(server.attestations) == 1


@pytest.mark.bears("O03")
async def test_an_expired_agent_joins_again_when_it_can_and_serves_what_is_valid(directory) -> None:
    token = directory / "token"
    token.write_text("token-1")
    async with FakeServer(directory) as server:
        server.entries["e1"] = entry_message("e1", "/wl/me", [ME])
        server.agent_ttl = timedelta(seconds=2)
        async with serving(server, directory, join_token=None, join_token_file=token) as agent:
            first = await agent.x509()
            await server.__aexit__()
            await until(lambda: agent.agent.node.tls is None)
            assert (await agent.x509()).svids[0] == first.svids[0]
            async with server:
                server.agent_ttl = timedelta(hours=1)
                await until(lambda: "token-1" in server.attestations[1:])  # refused: used
                assert (await agent.x509()).svids[0] == first.svids[0]
                server.tokens["token-2"] = "x"
                token.write_text("token-2\n")
                await until(lambda: agent.agent.node.tls is not None and agent.agent.sync.is_online)
                assert str(agent.agent.node.id).endswith("token-2")
        await server.__aenter__()


@pytest.mark.bears("O04")
@pytest.mark.parametrize("code", ["agent_banned", "agent_not_attested"])
async def test_a_banned_agent_serves_nobody_and_keeps_no_key(directory, code) -> None:
    async with FakeServer(directory) as server:
        server.entries["e1"] = entry_message("e1", "/wl/me", [ME])
        async with serving(server, directory) as agent, agent.workload() as stub:
            call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=(("workload.spiffe.io", "true"),))
            assert (await call.read()).svids
            await until(lambda: len(agent.agent.svids.spares) == 1)
            server.refuse_agents = Refused("the agent is banned", code=code)
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await asyncio.wait_for(call.read(), 30)
            assert ended.value.code() == grpc.StatusCode.PERMISSION_DENIED
            assert stored_identity(directory) is None
            assert len(agent.agent.svids.spares) == 0
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await agent.jwt("a")
            assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
            # Let in again with a new token, it is an agent as before.
            server.refuse_agents = None
            server.tokens["token-1"] = "again"
            await until(lambda: agent.agent.sync.is_online)
            assert (await agent.x509()).svids


@pytest.mark.bears("O02")
async def test_a_restart_without_the_server_stays_up_and_recovers(directory) -> None:
    async with FakeServer(directory) as server:
        server.entries["e1"] = entry_message("e1", "/wl/me", [ME])
        async with serving(server, directory):
            pass
        await server.__aexit__()
        async with serving(server, directory, synced=False) as agent:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await agent.x509()
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
            async with server:
                await until(lambda: agent.agent.sync.is_online)
                assert (await agent.x509()).svids
        await server.__aenter__()


async def test_a_damaged_identity_is_left_for_a_new_one(directory) -> None:
    async with FakeServer(directory) as server:
        async with serving(server, directory):
            pass
        (directory / "agent" / "private" / "identity.json").write_bytes(b"{}")
        server.tokens["token-1"] = "again"
        async with serving(server, directory):
            assert len(server.attestations) == 2


@pytest.mark.bears("O06")
@pytest.mark.parametrize("path", ["/wl/victim", "/spire/server", ""])
async def test_only_an_agents_identity_is_taken(directory, path) -> None:
    async with FakeServer(directory) as server:
        server._agent_svid = lambda _, csr: _svid(server, SpiffeId.of(TD, path), csr)
        assert (await refusal(server, directory)).reason.startswith("svid")


@pytest.mark.bears("O06")
async def test_another_domains_or_keys_identity_is_not_taken(directory) -> None:
    foreign = FakeCa(TrustDomain("other.example"))
    async with FakeServer(directory) as server:
        good = server._agent_svid

        def of_other_key(path, csr):
            answer = good(path, csr)
            answer.cert_chain[0] = server.ca.identity(SpiffeId.of(TD, path)).chain_der[0]
            return answer

        def of_other_domain(path, csr):
            answer = good(path, csr)
            answer.cert_chain[0] = foreign.identity(SpiffeId.of(foreign.trust_domain, path)).chain_der[0]
            return answer

        for forged in (of_other_key, of_other_domain):
            server._agent_svid = forged
            server.tokens["token-1"] = "x"
            assert (await refusal(server, directory)).reason.startswith("svid")


def _svid(server, spiffe_id, csr):
    return x509svid_pb2.X509SVID(cert_chain=[server.ca.leaf(spiffe_id, x509.load_der_x509_csr(csr).public_key())])


async def test_a_challenge_is_answered_by_the_attestor(directory) -> None:
    async with FakeServer(directory) as server:
        plain = server.AttestAgent
        answers = []

        async def challenging(requests, context, peer):
            first = await anext(requests)
            yield agent_pb2.AttestAgentResponse(challenge=b"prove it")
            answers.append((await anext(requests)).challenge_response)

            async def rest():
                yield first

            async for response in plain(rest(), context, peer):
                yield response

        class Attestor:
            async def evidence(self):
                return Evidence("join_token", b"token-1")

            async def respond(self, challenge):
                return challenge[::-1]

        server.AttestAgent = challenging
        await server.__aexit__()
        async with server:
            settings = AgentSettings(
                trust_domain=TD,
                runtime_dir=directory / "a",
                server_port=server.port,
                trust_bundle_path=server.trust_file(),
                join_token="token-1",
            )
            async with Agent(settings) as it:
                it.node._attestor = Attestor()
                await it.node.attest(it.upstream)
                assert answers == [b"ti evorp"]
        await server.__aenter__()


async def test_the_bundle_is_followed_and_stored(directory) -> None:
    async with FakeServer(directory) as server, serving(server, directory) as agent:
        new = FakeCa()
        server.push_bundles(server.ca.message((new,)))
        await until(lambda: len(agent.agent.node.bundle.x509_authorities) == 2)
        await agent.agent.node.settle()
        stored = stored_identity(directory)
        assert stored.bundle.x509_authorities == (server.ca.root, new.root)


async def test_a_slow_disk_does_not_hold_up_the_agent(directory) -> None:
    async with FakeServer(directory) as server:
        server.entries["e1"] = entry_message("e1", "/wl/me", [ME])
        async with serving(server, directory) as agent:
            await agent.agent.node.settle()
            file, go = agent.agent.node._store, threading.Event()
            store = file.store
            file.store = lambda identity: (go.wait(30), store(identity))
            new = FakeCa()
            server.push_bundles(server.ca.message((new,)))
            await until(lambda: len(agent.agent.node.bundle.x509_authorities) == 2)
            assert (await agent.x509()).svids
            assert len(stored_identity(directory).bundle.x509_authorities) == 1
            go.set()
            await agent.agent.node.settle()
            assert len(stored_identity(directory).bundle.x509_authorities) == 2
