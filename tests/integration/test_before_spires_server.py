"""An agent before a server that has SPIRE's services and none of ours: the same estate, by questions instead of a stream."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2 as sync_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2, spiffeid_pb2
from broker.agent import polling, sync
from broker.agent.bootstrap import Condition
from broker.agent.upstream import AGENT
from broker.server.api.grpc import entries as entries_binding
from broker.server.api.grpc import entry as entry_binding
from broker.server.doors import Doors
from tests.fakes.running_agent import HEADER, until
from tests.fakes.small_estate import issuer_key_id, leaf_of, running_agent, running_server

LONG = 30
MANY = 1_100


@pytest.fixture(autouse=True)
def spires(monkeypatch) -> None:
    """On its TLS port the server has what SPIRE's has; its operators have the whole."""
    open_whole = Doors.open_tls

    async def open_tls(self, *arguments):
        services = [one for one in self.services if one[0].name.startswith(("spire.", "grpc."))]
        return await open_whole(replace(self, services=services), *arguments)

    monkeypatch.setattr(Doors, "open_tls", open_tls)
    monkeypatch.setattr(sync, "POLL_EVERY", 0.1)


class Told:
    """What a workload is told on one stream."""

    def __init__(self) -> None:
        self.svids = {}
        self.ended = ""

    async def follow(self, stub) -> None:
        try:
            async for message in stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER):
                self.svids = {one.spiffe_id.removeprefix("spiffe://example.org"): one for one in message.svids}
        except grpc.aio.AioRpcError as error:
            self.ended = error.code().name

    async def are(self, *paths: str) -> None:
        await until(lambda: set(self.svids) == set(paths), LONG)


async def test_entries_come_change_and_go_and_a_taint_and_a_ban_are_heard(directory) -> None:
    async with running_server(directory) as server, running_agent(server, directory) as agent:
        node = agent.agent.node.id.path
        first = await server.register(node, "/wl/one")
        told = Told()
        async with agent.workload() as stub, asyncio.TaskGroup() as group:
            following = group.create_task(told.follow(stub))
            await told.are("/wl/one")
            second = await server.register(node, "/wl/two")
            await told.are("/wl/one", "/wl/two")
            changed = entry_pb2.Entry(id=second, hint="h")
            await Stub(server.channel, entry_binding.BINDING).BatchUpdateEntry(
                sync_pb2.BatchUpdateEntryRequest(entries=[changed], input_mask=entry_pb2.EntryMask(hint=True))
            )
            await until(lambda: told.svids["/wl/two"].hint == "h", LONG)
            await server.entries.delete(first)
            await told.are("/wl/two")
            token = (await agent.jwt("aud")).svids[0]
            assert token.spiffe_id == "spiffe://example.org/wl/two"
            # What is tainted is replaced, and what is banned serves nobody.
            (old,) = await server.authorities.list("x509")
            made = await server.authorities.prepare("x509")
            await server.authorities.activate("x509", made.id)
            await server.authorities.taint("x509", old.id)
            await until(lambda: issuer_key_id(leaf_of(told.svids["/wl/two"])) == made.id, LONG)
            await until(lambda: agent.agent.sync.is_online, LONG)
            await server.authorities.revoke("x509", old.id)
            await until(lambda: len(agent.agent.cache.own_bundle.x509_authorities) == 1, LONG)
            assert agent.agent.reports.is_settled, "reports that nobody takes are not kept"
            await Stub(server.channel, AGENT).BanAgent(
                agent_pb2.BanAgentRequest(id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=node))
            )
            await following
            assert told.ended == "PERMISSION_DENIED"
            assert agent.agent.node.condition is Condition.LOST
            assert not (agent.settings.private_dir / "identity.json").exists()


async def test_more_entries_than_a_page_come_by_their_revisions(directory, monkeypatch) -> None:
    asked = []
    ask = polling._asked

    async def counting(call, request):
        entries, revisions = await ask(call, request)
        asked.append((len(request.ids), len(entries), len(revisions)))
        return entries, revisions

    monkeypatch.setattr(polling, "_asked", counting)
    async with running_server(directory) as server, running_agent(server, directory) as agent:
        node = agent.agent.node.id.path
        parent = spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=node)
        batch = [
            entries_pb2.RegisteredEntry(
                entry=entry_pb2.Entry(
                    spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=f"/w/{number}"),
                    parent_id=parent,
                    selectors=[selector_pb2.Selector(type="unix", value=f"uid:{10_000_000 + number}")],
                )
            )
            for number in range(MANY)
        ]
        for start in range(0, MANY, 550):
            await Stub(server.channel, entries_binding.BINDING).BatchCreateEntry(
                entries_pb2.BatchCreateEntryRequest(entries=batch[start : start + 550])
            )
        await until(lambda: len(agent.agent.cache) == MANY, LONG)
        asked.clear()
        await server.register(node, "/wl/me")
        assert (await agent.x509()).svids[0].spiffe_id == "spiffe://example.org/wl/me"
        # One more is one more: the others' revisions are known.
        assert {one[0] for one in asked} == {0, 1}
        assert {one[1] for one in asked if one[0]} == {1}
        asked.clear()
        await until(lambda: len(asked) >= 2, LONG)
        assert set(asked) == {(0, 0, MANY + 1)}
