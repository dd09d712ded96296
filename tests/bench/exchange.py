"""Durable exchanges: another token of a running task, by the node agent's socket and by HTTPS."""

import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlsplit

from broker.dev.certificates import Files
from broker.dev.stage import Process
from tests.bench.house import AUDIENCE, House
from tests.bench.measure import Item, commits, cpu_seconds, time_per_call, within

CALLERS = 32
ROUNDS = 3
SOCKET_RATE, HTTPS_RATE, P99_MS = 2000, 1500, 40.0
COMMITS = 500
ISSUE_PATH = "/broker.agent.v1.Tasks/IssueToken"


async def exchange_socket(house: House, seconds: float) -> list[Item]:
    """By the agent, against the same client, a bare relay and a bare echo: the same two hops with nothing to do.

    Twice: by frames, so that the load takes little of the processors that it shares with who is measured, and with gRPC's own
    library (``_by_grpcio``).
    """
    async with _started(house) as (caller, request):
        load = {"path": ISSUE_PATH, "request": request, "callers": CALLERS, "seconds": seconds / ROUNDS / 4}
        size = (await caller.do("grpc", socket=house.agent_socket, **load | {"seconds": 0.1}))["size"]
        echo, relay = house.socket("echo2"), house.socket("relay")
        told: dict[str, list[Mapping[str, Any]]] = {}
        spent = dict.fromkeys(("agent", "server"), 0.0)
        async with (
            house.bare("echo", "--socket", echo, "--answer", str(size)),
            house.bare("relay", "--socket", relay, "--to", echo),
        ):
            for by in ("frames", "grpc") * ROUNDS:
                told.setdefault(f"bare {by}", []).append(await caller.do(by, socket=relay, **load))
                with _spending(house, spent):
                    told.setdefault(by, []).append(await caller.do(by, socket=house.agent_socket, **load))
    _tell_spent(house, spent, [*told["frames"], *told["grpc"]])
    with commits(house.directory / "commits.db") as commit:
        durable = 1 / time_per_call(commit, COMMITS, clock=time.perf_counter)
    house.tell(f"  SQLite, one row in each commit, synchronous=FULL: {durable:,.0f} commits/s")
    return [
        *_judged("exchange_socket", told["frames"], told["bare frames"], SOCKET_RATE),
        *_judged("exchange_socket_by_grpcio", told["grpc"], told["bare grpc"], SOCKET_RATE),
    ]


@contextmanager
def _spending(house: House, spent: dict[str, float]) -> Iterator[None]:
    """Add to it what each part spends of the processors during the block."""
    before = {part: cpu_seconds(house.pid(part)) for part in spent}
    yield
    for part, seconds_before in before.items():
        spent[part] += cpu_seconds(house.pid(part)) - seconds_before


def _tell_spent(house: House, spent: Mapping[str, float], told: list[Mapping[str, Any]]) -> None:
    # What others on the machine change least.
    calls = sum(one["calls"] for one in told)
    each = ", ".join(f"{part} {used / calls * 1e6:.0f} us" for part, used in spent.items())
    house.tell(f"  processor time of one exchange: {each}")


async def exchange_https(house: House, seconds: float) -> list[Item]:
    """By mutual TLS with kept connections, against a bare uvicorn that reads the same form over TLS."""
    server = urlsplit(house.issuer)
    issuer = Files(house.estate.layout.issuer)
    async with _started(house) as (caller, _):
        load = {"callers": CALLERS, "seconds": seconds / ROUNDS / 2}
        product = {"host": "localhost", "port": server.port, "ca": ""}
        size = (await caller.do("form", **product, **load | {"seconds": 0.1}))["size"]
        files = json.dumps({"certificate": str(issuer.leaf), "key": str(issuer.leaf_key)})
        ours, bare = [], []
        spent = {"server": 0.0}
        async with house.program("bare", "form", "--answer", str(size - 13), "--files", files) as uvicorn:
            port = (await uvicorn.hear())["port"]
            other = {"host": "127.0.0.1", "port": port, "ca": str(issuer.ca)}
            for _ in range(ROUNDS):
                bare.append(await caller.do("form", **other, **load))
                with _spending(house, spent):
                    ours.append(await caller.do("form", **product, **load))
    _tell_spent(house, spent, ours)
    return _judged("exchange_https", ours, bare, HTTPS_RATE)


@asynccontextmanager
async def _started(house: House) -> AsyncIterator[tuple[Process, str]]:
    async with house.program("caller") as caller:
        started = await caller.do("start", user_token=await house.user_token(), resource=AUDIENCE)
        yield caller, started["request"]


def _judged(name: str, ours: list[Mapping[str, Any]], bare: list[Mapping[str, Any]], least: float) -> list[Item]:
    # The best round of each: noise of the machine only ever slows. Rate and delay are of the same round.
    best, limit = max(ours, key=_rate), max(bare, key=_rate)
    met = best["rate"] >= least
    return [
        Item(name, best["rate"], "exchanges/s", limit["rate"], f">= {least:,}/s", met),
        within(f"{name}_p99", best["p99"], "ms", limit["p99"], P99_MS),
    ]


def _rate(told: Mapping[str, Any]) -> float:
    return float(told["rate"])
