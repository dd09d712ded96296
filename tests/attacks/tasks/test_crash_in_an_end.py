"""A server that dies in the middle of an end: afterwards the tree is wholly open or wholly closed, and can be closed."""

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from broker._proto.broker.server.v1 import tasks_pb2
from broker._proto.service import Stub
from broker.server.api.grpc import tasks
from broker.spiffe import SpiffeId
from tests.attacks.tasks.binding_rig import short_directory
from tests.attacks.tasks.listening import listening
from tests.fakes.oidc import OidcIssuer
from tests.fakes.replicas import Replica, replica
from tests.integration.test_server_identity import DEADLINE, Node, attested, own_bundle
from tests.integration.test_token_endpoint import DETAILS, ISSUER, TICKETS, TRIAGE, Process, process, register

HELPER = SpiffeId("spiffe://example.org/helper")
DIED = 137
KILLS = int(os.environ.get("BROKER_CRASH_ROUNDS", "1"))
"""Servers that are killed at some moment of an end; a round is two starts of a server."""


def settings(oidc: OidcIssuer, failpoints: str = "") -> dict[str, str]:
    subject = {"issuer": oidc.issuer, "audiences": ["broker"], "ca_path": str(oidc.ca_path)}
    armed = {"BROKER_FAILPOINTS": failpoints, "BROKER_SERVER__ALLOW_FAILPOINTS": "true"} if failpoints else {}
    return armed | {
        "BROKER_SERVER__ISSUER": ISSUER,
        "BROKER_SERVER__SUBJECTS": json.dumps([subject]),
        "BROKER_SERVER__AUDIENCES": json.dumps([{"resource": TICKETS}]),
    }


class Tree:
    """A node with two workloads, and a task of the one with one of the other below it."""

    def __init__(self, node: Node, oidc: OidcIssuer, entries: dict[SpiffeId, str]) -> None:
        self.node, self.oidc, self.entries = node, oidc, entries

    @asynccontextmanager
    async def at(self, server: Replica) -> AsyncIterator[tuple[grpc.aio.Channel, Process, Process]]:
        """Come back to the server, as the same processes."""
        one: Any = server.server
        self.node.trusted = await own_bundle(one)
        async with self.node.dial(one.port) as channel, AsyncExitStack() as stack:
            both = [
                await stack.enter_async_context(
                    process(one, self.node, channel, entry, f"ws{who.path.replace('/', '_')}", self.node.trusted)
                )
                for who, entry in self.entries.items()
            ]
            yield channel, both[0], both[1]

    async def grow(self, channel: grpc.aio.Channel, first: Process, second: Process) -> tuple[list[str], list[str]]:
        """Give the two tasks, and a token of each."""
        stub = Stub(channel, tasks.BINDING)
        details, word = json.dumps(DETAILS), self.oidc.token("alice")
        start = tasks_pb2.StartTaskRequest(
            workload=first.session, user_token=word, purpose="p", authorization_details=details
        )
        root = await stub.StartTask(start, timeout=DEADLINE)
        asked = tasks_pb2.StartChildTaskRequest(
            workload=first.session, parent=root.id, agent=str(HELPER), purpose="p", authorization_details=details
        )
        below = await stub.StartChildTask(asked, timeout=DEADLINE)
        tokens = []
        for one, task in ((first, root), (second, below)):
            wanted = tasks_pb2.IssueTokenRequest(workload=one.session, task_id=task.id, resource=TICKETS)
            tokens.append((await stub.IssueToken(wanted, timeout=DEADLINE)).access_token)
        return [root.id, below.id], tokens


@pytest.mark.timeout(240)
@pytest.mark.bears("V05", "RV09")
async def test_a_tree_is_wholly_open_or_wholly_closed_after_a_crash(oidc: OidcIssuer) -> None:
    luck, outcomes = random.Random(4711), []
    with short_directory() as directory:
        tree: Tree | None = None
        for how in ("lifecycle.before_commit=exit", *[""] * KILLS):
            async with replica(directory, "one", _store(directory), **settings(oidc, how)) as server:
                if tree is None:
                    one: Any = server.server
                    async with attested(one) as (node, agent_id, _):
                        entries = {who: await register(one, agent_id, who) for who in (TRIAGE, HELPER)}
                        tree = Tree(node, oidc, entries)
                async with tree.at(server) as (channel, first, second):
                    names, tokens = await tree.grow(channel, first, second)
                    ending = asyncio.ensure_future(first.http.post(f"/tasks/{names[0]}/complete"))
                    if how:
                        assert await server.process.wait() == DIED
                    else:
                        await asyncio.sleep(luck.random() * 0.02)
                        server.process.send_signal(signal.SIGKILL)
                        await server.process.wait()
                    (answer,) = await asyncio.gather(ending, return_exceptions=True)
            answered = not isinstance(answer, BaseException)
            async with (
                replica(directory, "one", _store(directory), **settings(oidc)) as server,
                tree.at(server) as (channel, first, second),
            ):
                outcomes.append(await _judged(channel, first, second, names, tokens))
            if how:
                assert outcomes == ["open"]
            assert not (answered and outcomes[-1] == "open"), "what was answered is done"
    print(f"after a crash: {outcomes}")


def _store(directory: Path) -> str:
    return f"sqlite://{directory}/broker.db"


async def _judged(
    channel: grpc.aio.Channel, first: Process, second: Process, names: list[str], tokens: list[str]
) -> str:
    """Say whether the tree is open or closed, the same by everyone who judges it; then close it, and look again."""

    async def active() -> set[bool]:
        answers = [
            await who.http.post("/introspect", data={"token": token})
            for who, token in ((first, tokens[0]), (second, tokens[1]))
        ]
        return {bool(answer.json()["active"]) for answer in answers}

    async def states() -> list[str]:
        answers = [await who.http.get(f"/tasks/{name}") for who, name in ((first, names[0]), (second, names[1]))]
        return [str(answer.json()["state"]) for answer in answers]

    async with listening(channel) as ear:
        found, seen = await states(), {ear.says(token) for token in tokens}
        if found == ["active", "active"]:
            assert (await active(), seen) == ({True}, {"alive"})
            assert (await first.http.post(f"/tasks/{names[0]}/complete")).status_code == 200
            assert {await ear.refuses(token) for token in tokens} == {"task_ended"}
            outcome = "open"
        else:
            assert seen == {"task_ended"}
            outcome = "closed"
    assert (await states(), await active()) == (["completed", "cascaded"], {False})
    return outcome
