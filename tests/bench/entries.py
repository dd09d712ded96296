"""From an operator's word to the SVID in a process: an entry is created, and arrives on a stream that is open already."""

import asyncio
import time

import grpc.aio
from cryptography.hazmat.primitives.asymmetric import ec

from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import WORKLOAD
from broker.client import Entries
from broker.dev.configuration import NODE_ALIAS, TRUST_DOMAIN
from broker.sdk.endpoint import SECURITY_HEADER
from tests.bench.house import ME, House
from tests.bench.measure import Item, commits, percentile, within
from tests.bench.signing import Bare

ENTRIES = 10_000
AGENTS = 100
"""One of them is the estate's own, with the stream; the others follow Watch."""
SAMPLES = 200
DEADLINE = 10.0
P99_MS = 100.0


async def entry_to_svid(house: House, seconds: float) -> list[Item]:
    """Milliseconds from asking for the entry to the message that brings its SVID, with a full house."""
    samples = max(20, int(SAMPLES * min(1.0, seconds / 4)))
    tokens = [await house.join_token() for _ in range(AGENTS - 1)]
    layout = house.estate.layout
    arguments = (house.address, str(layout.bundle), TRUST_DOMAIN, str(house.directory / "fleet"))
    async with house.program("fleet", *arguments) as fleet:
        began = time.monotonic()
        joined = await fleet.do("join", tokens=tokens)
        each = ENTRIES // AGENTS
        for number, parent in enumerate([*joined["ids"], NODE_ALIAS]):
            await house.register(parent, [f"/bench/n{number}/{one}" for one in range(each)])
        told = await fleet.do("follow")
        house.tell(f"{AGENTS} agents and {ENTRIES} entries in {time.monotonic() - began:.1f} s")
        if told["entries"] != each * (AGENTS - 1):
            raise RuntimeError(f"the fleet was told of {told['entries']} entries")
        took = await _samples(house, samples)
        bare = await _bare(house, samples)
    return [within("entry_to_svid_p99", percentile(took, 99), "ms", percentile(bare, 99), P99_MS)]


async def _bare(house: House, count: int) -> list[float]:
    """What no server could leave out: two calls, two durable commits, one key and one signature, one after the other."""
    took: list[float] = []
    certificates, socket = Bare(), house.socket("bare-entry")
    async with (
        house.bare("echo", "--socket", socket, "--answer", "1500"),
        grpc.aio.insecure_channel(f"unix:{socket}") as channel,
    ):
        call = channel.unary_unary("/bench.Bare/Call")
        with commits(house.directory / "bare-entry.db") as commit:
            for _ in range(count):
                began = time.perf_counter()
                for _ in range(2):
                    await call(b"a" * 200)
                    commit()
                ec.generate_private_key(ec.SECP256R1())
                certificates.sign()
                took.append((time.perf_counter() - began) * 1000)
    return took


async def _samples(house: House, count: int) -> list[float]:
    operator = Entries(house.admin)
    took: list[float] = []
    async with (
        grpc.aio.insecure_channel(f"unix:{house.agent_socket}") as channel,
        asyncio.timeout(DEADLINE + count * 0.5),
    ):
        stream = Stub(channel, WORKLOAD).FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=SECURITY_HEADER)
        mine = {svid.spiffe_id for svid in (await stream.read()).svids}
        for number in range(count):
            path = f"/bench/new/{number}"
            wanted = mine | {f"spiffe://{TRUST_DOMAIN}{path}"}
            began = time.perf_counter()
            created = asyncio.create_task(operator.create(house.entry(path, NODE_ALIAS, ME)))
            await _until(stream, wanted)
            took.append((time.perf_counter() - began) * 1000)
            # Taken away again, and seen to be: the next message is as large as this one.
            await operator.delete((await created).entry.id)
            await _until(stream, mine)
    return took


async def _until(stream: grpc.aio.UnaryStreamCall, wanted: set[str]) -> None:
    while {svid.spiffe_id for svid in (await stream.read()).svids} != wanted:
        pass
