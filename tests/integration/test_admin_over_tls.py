"""``broker … --addr``: an operator far from the server, known by an X.509-SVID: by an admin entry, by ``admin_ids``, or not at all."""

import asyncio
import json
import os
import sqlite3
import sys
from contextlib import AsyncExitStack, closing

from broker.spiffe import SpiffeId
from tests.fakes.running_agent import until
from tests.fakes.small_estate import running_agent, running_server

ME = "spiffe://example.org/ops"
VERBS = (
    "agent list",
    "entry count",
    "bundle list",
    "authority x509 show",
    "federation list",
    "join-token create",
    "svid mint jwt --spiffe-id spiffe://example.org/minted --audience a",
)
"""One verb at least of each noun that an operator uses."""


class Far:
    """The command in a process of its own, which has the agent's socket and the server's address, and no admin socket."""

    def __init__(self, agent, server):
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "SPIFFE_"))}
        self.environment = {**plain, "SPIFFE_ENDPOINT_SOCKET": f"unix://{agent.socket}"}
        self.address = f"127.0.0.1:{server.server.port}"

    async def run(self, *words, address=None, seconds=60):
        """Give the exit code and the answer: the data, or the error."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "broker.cli.main", *words, "--addr", address or self.address, "-o", "json", "-q", "--timeout", f"{seconds}s",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=self.environment,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 90)
        return process.returncode, json.loads(out) if out.strip() else json.loads(err)["error"]


def records(server):
    with closing(sqlite3.connect(f"file:{server.directory}/broker.db?mode=ro", uri=True)) as database:
        return [json.loads(body) for (body,) in database.execute("SELECT body FROM audit_records ORDER BY seq")]


async def estate(stack, directory, **changed):
    server = await stack.enter_async_context(running_server(directory, **changed))
    agent = await stack.enter_async_context(running_agent(server, directory))
    return server, agent, Far(agent, server)


async def test_an_admin_entry_makes_an_operator_and_its_end_unmakes_one(directory):
    async with AsyncExitStack() as stack:
        server, agent, far = await estate(stack, directory)
        node = agent.agent.node.id.path
        entry = await server.register(node, "/ops", admin=True)
        for code, answer in await asyncio.gather(*(far.run(*verb.split()) for verb in VERBS)):
            assert (code, "kind" in answer) == (0, True), answer
        code, made = await far.run(
            "entry", "create", "--spiffe-id", f"{ME}/made", "--parent-id", str(agent.agent.node.id), "--selector", "unix:uid:4242"
        )  # fmt: skip
        assert code == 0
        # Who did it is on record by name, not by the socket it came through.
        (record,) = (one for one in records(server) if made["id"] in json.dumps(one))
        assert ME in json.dumps(record)
        assert (await far.run("entry", "delete", made["id"], "--yes"))[0] == 0
        # The same SVID is nobody's operator as soon as its entry no longer says so.
        await server.entries.delete(entry)
        await server.register(node, "/ops")
        await until(lambda: any(not one.admin for one in agent.agent.cache.entries), 20)
        before = len(records(server))
        for code, error in await asyncio.gather(*(far.run(*verb.split()) for verb in VERBS[-3:])):
            assert (code, bool(error["hint"])) == (4, True), error
        assert (await far.run("bundle", "show"))[0] == 0  # which anybody may
        assert len(records(server)) > before  # refusals are on record, too


async def test_admin_ids_name_operators_without_an_entry_that_says_so(directory):
    async with AsyncExitStack() as stack:
        server, agent, far = await estate(stack, directory, admin_ids=(SpiffeId(ME),))
        node = agent.agent.node.id.path
        named = await server.register(node, "/ops")
        assert (await far.run("entry", "list"))[0] == 0
        await server.entries.delete(named)
        await server.register(node, "/ops/below")
        code, error = await far.run("entry", "list")
        assert (code, bool(error["hint"])) == (4, True)


async def test_who_has_no_identity_or_finds_another_server_is_told_so(directory):
    async with AsyncExitStack() as stack:
        server, agent, far = await estate(stack, directory, admin_ids=(SpiffeId(ME),))
        code, error = await far.run("entry", "list")
        assert (code, error["code"]) == (4, "no_identity_issued")
        await server.register(agent.agent.node.id.path, "/ops")
        # Under the same address family and with the same trust domain's name, of another authority: nothing is sent there.
        other = await stack.enter_async_context(running_server(directory, "other"))
        code, error = await far.run("entry", "list", address=f"127.0.0.1:{other.server.port}", seconds=3)
        assert code == 75
        assert (await far.run("entry", "list", address="127.0.0.1:1", seconds=3))[0] == 75
        assert (await far.run("entry", "list", address="nonsense"))[0] == 2
        far.environment["SPIFFE_ENDPOINT_SOCKET"] = f"unix://{directory}/nobody.sock"
        assert (await far.run("entry", "list", seconds=1))[0] == 75
