"""One server, and a channel to it for each role of SPIRE's own policy."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio

from broker._proto.service import Stub
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker.server.api.grpc import svid
from broker.server.app import Server
from broker.spiffe import SpiffeId
from tests.integration.identity_rig import (
    DEADLINE,
    Estate,
    Node,
    admin_channel,
    create_entry,
    csr,
    join_token,
    own_bundle,
    running,
)

AGENT = "spire.api.server.agent.v1.Agent"
BUNDLE = "spire.api.server.bundle.v1.Bundle"
ENTRY = "spire.api.server.entry.v1.Entry"
SVID = "spire.api.server.svid.v1.SVID"


@dataclass
class Callers:
    """A channel for each role, to one server."""

    server: Server
    agent_id: SpiffeId
    by_role: dict[str, grpc.aio.Channel] = field(default_factory=dict)

    def stub(self, binding: object, role: str) -> Stub:
        return Stub(self.by_role[role], binding)


@asynccontextmanager
async def callers(estate: Estate, **changes: object) -> AsyncIterator[Callers]:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(running(estate, **changes))
        trusted = await own_bundle(one)
        node = Node(trusted)
        made = Callers(one, await node.attest(one.port, await join_token(one)))
        enter = stack.enter_async_context
        made.by_role["local"] = await enter(admin_channel(one))
        made.by_role["agent"] = await enter(node.dial(one.port))
        made.by_role["anonymous"] = await enter(Node(trusted).dial(one.port))
        for role, fields in (("admin", {"admin": True}), ("downstream", {"downstream": True}), ("workload", {})):
            created = await create_entry(one, made.agent_id, f"/{role}", **fields)
            workload = Node(trusted)
            params = svid_pb2.NewX509SVIDParams(entry_id=created.entry.id, csr=csr(workload.key))
            answer = await made.stub(svid.BINDING, "agent").BatchNewX509SVID(
                svid_pb2.BatchNewX509SVIDRequest(params=[params]), timeout=DEADLINE
            )
            workload.chain = tuple(answer.results[0].svid.cert_chain)
            made.by_role[role] = await enter(workload.dial(one.port))
        yield made
