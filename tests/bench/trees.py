"""Trees of tasks: how long a chain of agents takes to get to work, and how fast ten thousand tasks end for good."""

import asyncio
import json
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from broker._proto.broker.agent.v1 import feed_pb2 as agent_feed_pb2
from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.broker.server.v1 import feed_pb2
from broker._proto.service import ServiceBinding, Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import WORKLOAD
from broker.client import Entries, Tasks
from broker.dev.configuration import NODE_ALIAS, TRUST_DOMAIN
from broker.errors import Refused
from broker.sdk import Workload
from broker.sdk.endpoint import SECURITY_HEADER
from broker.sdk.verify import TokenVerifier
from broker.spiffe.x509svid import split_der
from tests.bench.house import AUDIENCE, ME, House
from tests.bench.measure import Item, commits, percentile, within

BRANCHES, LEAVES = 100, 99
"""Tasks below the root, and below each of those: with the root 10,001."""
HOPS = 5
SAMPLES = 100
"""Of fewer, the p99 would be the worst one."""
WRITERS = 16
DEADLINE = 120.0
"""Seconds for the slowest part, which is to plant the tree."""
COMMIT_MS, REFUSED_MS, HOPS_MS = 50.0, 100.0, 100.0
"""The last one: ten calls in a row, ten milliseconds each."""
FRAME_BYTES = 400
LOOK_EVERY = 0.0005
"""Seconds between two looks of the verifier: a look takes microseconds."""
DETAILS = json.dumps([{"type": "api", "locations": [AUDIENCE], "actions": ["ticket.read"]}])
_TASKS = ServiceBinding.of(tasks_pb2.DESCRIPTOR, "Tasks")
_FEED = ServiceBinding.of(agent_feed_pb2.DESCRIPTOR, "Feed")


def name(number: int) -> str:
    """The identity of an agent at this place of a chain."""
    return f"spiffe://{TRUST_DOMAIN}/bench/hop{number}"


@dataclass
class Agents:
    """This process as several agents, by the node agent's socket."""

    channel: grpc.aio.Channel
    api: Stub
    chains: dict[str, Sequence[bytes]]
    user_token: str

    async def _ask(self, method: str, request: Any) -> Any:
        return await getattr(self.api, method)(request, metadata=SECURITY_HEADER, timeout=10)

    async def start(self, number: int) -> Any:
        request = tasks_pb2.StartTaskRequest(
            spiffe_id=name(number),
            user_token=self.user_token,
            purpose="to be measured",
            authorization_details=DETAILS,
            idempotency_key=secrets.token_urlsafe(16),
        )
        return await self._ask("StartTask", request)

    async def child(self, number: int, parent: str, to: int) -> Any:
        request = tasks_pb2.StartChildTaskRequest(
            spiffe_id=name(number),
            parent=parent,
            agent=name(to),
            purpose="a part of it",
            authorization_details=DETAILS,
            idempotency_key=secrets.token_urlsafe(16),
        )
        return await self._ask("StartChildTask", request)

    async def token(self, number: int, task_id: str) -> str:
        request = tasks_pb2.IssueTokenRequest(spiffe_id=name(number), task_id=task_id, resource=AUDIENCE)
        token: str = (await self._ask("IssueToken", request)).access_token
        return token


@asynccontextmanager
async def agents(house: House) -> AsyncIterator[Agents]:
    """Let this process be as many agents as a chain has."""
    operator = Entries(house.admin)
    made = [
        await operator.create(house.entry(f"/bench/hop{number}", NODE_ALIAS, ME, may_start_tasks=True))
        for number in range(HOPS)
    ]
    wanted = {name(number) for number in range(HOPS)}
    try:
        async with grpc.aio.insecure_channel(f"unix:{house.agent_socket}") as channel:
            async with asyncio.timeout(DEADLINE):
                stream = Stub(channel, WORKLOAD).FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=SECURITY_HEADER)
                chains: dict[str, Sequence[bytes]] = {}
                while not wanted <= chains.keys():
                    message = await stream.read()
                    chains = {one.spiffe_id: tuple(split_der(one.x509_svid)) for one in message.svids}
            yield Agents(channel, Stub(channel, _TASKS), chains, await house.user_token())
            stream.cancel()
    finally:
        await operator.delete_many([one.entry.id for one in made])


async def five_hops(house: House, seconds: float) -> list[Item]:
    """Milliseconds from the start of a task to the fifth agent's token; each agent fetches one before it goes on."""
    samples = max(10, int(SAMPLES * min(1.0, seconds / 4)))
    calls = 2 * HOPS
    took: list[float] = []
    bare: list[float] = []
    async with agents(house) as here, _bare_chain(house, calls) as chain:
        for _ in range(samples):
            began = time.perf_counter()
            task = await here.start(0)
            await here.token(0, task.id)
            for number in range(1, HOPS):
                task = await here.child(number - 1, task.id, number)
                await here.token(number, task.id)
            took.append((time.perf_counter() - began) * 1000)
            # In turn: a disk has good and bad minutes, and both are to have the same.
            began = time.perf_counter()
            await chain()
            bare.append((time.perf_counter() - began) * 1000)
    house.tell(
        f"  p50 {percentile(took, 50):.1f} ms for {calls} calls, each through the node agent with a durable commit; "
        f"bare {percentile(bare, 50):.1f} ms"
    )
    return [within("five_hops_p99", percentile(took, 99), "ms", percentile(bare, 99), HOPS_MS)]


@asynccontextmanager
async def _bare_chain(house: House, calls: int) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Give what makes as many calls over a bare echo, with a durable commit each, one after the other."""
    socket = house.socket("bare-hops")
    async with (
        house.bare("echo", "--socket", socket, "--answer", "1500"),
        grpc.aio.insecure_channel(f"unix:{socket}") as channel,
    ):
        call = channel.unary_unary("/bench.Bare/Call")
        with commits(house.directory / "bare-hops.db") as commit:

            async def chain() -> None:
                for _ in range(calls):
                    await call(b"a" * 500)
                    commit()

            yield chain


async def end_of_tree(house: House, seconds: float) -> list[Item]:
    """A tree of 10,001 tasks ends by an operator's word: the call, its one frame, and the refusal at a verifier that listens."""
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(agents(house))
        root, token = await _grow(house, here)
        me = await stack.enter_async_context(Workload.connect(f"unix:{house.agent_socket}"))
        verifier = await TokenVerifier.discover(house.issuer, audience=AUDIENCE, workload=me)
        stack.push_async_callback(verifier.aclose)
        listener = await stack.enter_async_context(_listening(here.channel))
        chain = here.chains[name(2)]
        verifier.verify_now(token, chain)
        began = time.perf_counter()
        revoked = asyncio.create_task(Tasks(house.admin, timeout=DEADLINE).revoke(root))
        refused = asyncio.create_task(_refused(verifier, token, chain))
        over = await revoked
        call = (time.perf_counter() - began) * 1000
        delay = (await refused - began) * 1000
        living = await Tasks(house.admin, timeout=DEADLINE).list(root=root, state="live")
        rows = asyncio.create_task(_rows_written(house, began))
        async with asyncio.timeout(DEADLINE):
            while not listener.frames:
                await asyncio.sleep(LOOK_EVERY)
        told = listener.frames
        async with asyncio.timeout(DEADLINE):
            while (seen := (await Tasks(house.admin).get(root)).revocation).state != "closed":
                await asyncio.sleep(LOOK_EVERY)
        house.tell(f"  the last of {seen.expected} acknowledged {seen.max_ms:.1f} ms after the commit")
        house.tell(f"  the row of each task tells it {await rows * 1000:.0f} ms after the call began")
    if living or over.state != "revoked" or [frame.kind for frame in told] != ["subtree"]:
        frames = [frame.kind for frame in told]
        raise RuntimeError(f"the tree ended as {over.state} with the frames {frames}, and {len(living)} tasks live")
    bare = _bare_update(house.directory / "bare-tree.db", 1 + BRANCHES * (1 + LEAVES))
    return [
        # To the answer of the call: the commit is a part of it.
        within("end_of_tree_commit", call, "ms", bare, COMMIT_MS),
        within("end_of_tree_refused", delay, "ms", bare, REFUSED_MS),
        within("end_of_tree_frame", float(told[0].ByteSize()), "bytes", float(len(root)), FRAME_BYTES),
    ]


async def _grow(house: House, here: Agents) -> tuple[str, str]:
    """Give the root's id and a token of a leaf."""
    began = time.monotonic()
    root = await here.start(0)
    branches = [await here.child(0, root.id, 1) for _ in range(BRANCHES)]
    wanted = iter([branch for branch in branches for _ in range(LEAVES)])
    leaf = ""

    async def write() -> None:
        nonlocal leaf
        for branch in wanted:
            leaf = (await here.child(1, branch.id, 2)).id

    async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as group:
        for _ in range(WRITERS):
            group.create_task(write())
    found = await Tasks(house.admin, timeout=DEADLINE).list(root=root.id, state="live")
    house.tell(f"  {len(found)} tasks in {time.monotonic() - began:.1f} s")
    if len(found) != 1 + BRANCHES * (1 + LEAVES):
        raise RuntimeError("the tree is not whole")
    return root.id, await here.token(2, leaf)


class _Listener:
    """Another subscriber of the feed, by the node agent: it keeps what comes after it has the snapshot."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._api = Stub(channel, _FEED)
        self.frames: list[feed_pb2.Frame] = []

    async def run(self, ready: asyncio.Event) -> None:
        call = self._api.Subscribe(metadata=SECURITY_HEADER)
        await call.write(feed_pb2.SubscribeRequest())
        while True:
            message: feed_pb2.FeedMessage = await call.read()
            match message.WhichOneof("kind"):
                case "snapshot" if not message.snapshot.more:
                    ready.set()
                case "frame" if ready.is_set():
                    self.frames.append(message.frame)
                    await call.write(feed_pb2.SubscribeRequest(acked=message.seq, store=message.store))


@asynccontextmanager
async def _listening(channel: grpc.aio.Channel) -> AsyncIterator[_Listener]:
    listener, ready = _Listener(channel), asyncio.Event()
    running = asyncio.create_task(listener.run(ready))
    try:
        async with asyncio.timeout(DEADLINE):
            await ready.wait()
        yield listener
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _refused(verifier: TokenVerifier, token: str, chain: Sequence[bytes]) -> float:
    """Verify the token again and again until it is refused; give the time of that."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                verifier.verify_now(token, chain)
            except Refused:
                return time.perf_counter()
            await asyncio.sleep(LOOK_EVERY)


async def _rows_written(house: House, began: float) -> float:
    """Wait until no end of a tree is left to be written into rows; give the seconds since ``began``."""
    (path,) = (house.directory / "estate").rglob("broker.db")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as database:
        async with asyncio.timeout(DEADLINE):
            while database.execute("SELECT count(*) FROM tree_ends").fetchone() != (0,):
                await asyncio.sleep(10 * LOOK_EVERY)
    return time.perf_counter() - began


def _bare_update(path: Path, rows: int) -> float:
    """Milliseconds of the plain way, for comparison: that many short rows, changed by one statement, durably.

    The server says it in one row and writes those of the tasks afterwards, so it may well be faster.
    """
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            database.execute(f"PRAGMA {pragma}").fetchall()
        database.execute("CREATE TABLE rows (id TEXT PRIMARY KEY, state TEXT, ended INTEGER, body BLOB) WITHOUT ROWID")
        database.execute("BEGIN")
        body = b"a" * 600
        database.executemany(
            "INSERT INTO rows VALUES (?, 'active', NULL, ?)", ((secrets.token_hex(13), body) for _ in range(rows))
        )
        database.execute("COMMIT")
        began = time.perf_counter()
        database.execute("UPDATE rows SET state = 'cascaded', ended = 1")
        return (time.perf_counter() - began) * 1000
