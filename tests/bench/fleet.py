"""Light node agents: attested, connected, following Watch, and nothing else. As a program of its own: a fleet of them."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from attestors.node.join_token import JoinTokenAgent, JoinTokenSettings
from broker._proto.broker.server.v1 import watch_pb2
from broker.agent.app import SERVER_PATH
from broker.agent.bootstrap import NodeIdentity, join
from broker.agent.identity_file import IdentityFile
from broker.agent.trust import read_trust_bundle
from broker.agent.upstream import Upstream
from broker.clock import SystemClock
from broker.dev.lines import heard, say
from broker.spiffe import Bundle, SpiffeId, TrustDomain
from broker.telemetry.log import configure
from broker.transport.dialer import SpiffeDialer

AT_ONCE = 8
"""Agents that join side by side."""


class LightAgent:
    """One of them: who it is, and its calls."""

    def __init__(self, spiffe_id: str, upstream: Upstream) -> None:
        self.id = spiffe_id
        self.upstream = upstream
        self.entries = 0

    async def follow(self, synced: asyncio.Event) -> None:
        """Follow the server's word for ever; count the entries of the snapshot."""
        async for message in self.upstream.watch.Watch(watch_pb2.WatchRequest()):
            if message.WhichOneof("kind") == "snapshot":
                self.entries += len(message.snapshot.entries)
                if not message.snapshot.more:
                    synced.set()


@asynccontextmanager
async def light_agent(address: str, bundle: Bundle, token: str, directory: Path) -> AsyncIterator[LightAgent]:
    """Join by a one-time token, and stay for as long as the block lasts."""
    clock = SystemClock()
    store = IdentityFile(directory)
    store.prepare()
    node = NodeIdentity(
        bundle.trust_domain,
        store,
        JoinTokenAgent(JoinTokenSettings(join_token=token)),
        clock,
        bundle=bundle,
        on_change=lambda: dialer.reconnect(),  # noqa: PLW0108 - there is no dialer yet
        on_lost=lambda: None,
    )
    dialer = SpiffeDialer(
        address,
        identity=lambda: node.tls,
        bundles=lambda: node.bundles,
        expect=SpiffeId.of(bundle.trust_domain, SERVER_PATH),
        clock=clock,
        directory=directory,
    )
    async with dialer as channel:
        upstream = Upstream(channel)
        await join(node, upstream)
        yield LightAgent(str(node.id), upstream)


async def serve(address: str, bundle_path: Path, trust_domain: str, directory: Path) -> None:
    """Join with the tokens that come on standard input, then follow until it ends."""
    bundle = read_trust_bundle(bundle_path, TrustDomain(trust_domain))
    room = asyncio.Semaphore(AT_ONCE)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        agents: list[LightAgent] = []
        following: list[asyncio.Task[None]] = []

        async def joined(number: int, token: str) -> LightAgent:
            async with room:
                return await stack.enter_async_context(
                    light_agent(address, bundle, token, directory / f"n{len(agents) + number}")
                )

        async for request in heard():
            if request["do"] == "join":
                agents += await asyncio.gather(*(joined(n, t) for n, t in enumerate(request["with"]["tokens"])))
                say({"ids": [agent.id for agent in agents]})
            else:
                synced = [asyncio.Event() for _ in agents]
                following += [group.create_task(a.follow(s)) for a, s in zip(agents, synced, strict=True)]
                await asyncio.gather(*(event.wait() for event in synced))
                say({"entries": sum(agent.entries for agent in agents)})
        for task in following:
            task.cancel()


if __name__ == "__main__":
    configure("warning", "json")  # to standard error: the other one is for answers
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])))
