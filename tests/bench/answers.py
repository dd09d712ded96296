"""The agent's socket: JWT-SVIDs that are kept, and the first X.509-SVID of a new process."""

import base64
from collections.abc import Mapping
from typing import Any

from broker._proto.spiffe import workload_pb2
from broker.dev.stage import Process
from tests.bench.house import House
from tests.bench.measure import Item, at_least, at_most, percentile, within

CALLERS = 32
ROUNDS = 3
JWT_SHARE = 0.50
JWT_PATH = "/SpiffeWorkloadAPI/FetchJWTSVID"
X509_PATH = "/SpiffeWorkloadAPI/FetchX509SVID"
NEWCOMERS = 120
NEWCOMER_PAUSE = 0.03
"""Seconds between two new processes: the agent signs the next spare meanwhile."""
P50_MS, P99_MS = 5.0, 25.0
LIBRARY_TIMES = 2.0
"""Of what a bare server takes, where the caller uses Python's gRPC library: that alone is more than the budget on some machines."""


async def fetch_jwt_svid_warm(house: House, seconds: float) -> list[Item]:
    """Calls a second for one audience, again and again, against an echo of the same sizes."""
    request = workload_pb2.JWTSVIDRequest(audience=["https://vault.dev.test"]).SerializeToString()
    load = {
        "path": JWT_PATH,
        "request": base64.b64encode(request).decode(),
        "callers": CALLERS,
        "seconds": seconds / ROUNDS / 2,
    }
    values, limits = [], []
    async with house.program("caller") as caller:
        size = (await caller.do("grpc", socket=house.agent_socket, **load | {"seconds": 0.1}))["size"]
        socket = house.socket("echo")
        async with house.bare("echo", "--socket", socket, "--answer", str(size)):
            for _ in range(ROUNDS):
                limits.append((await caller.do("grpc", socket=socket, **load))["rate"])
                values.append((await caller.do("grpc", socket=house.agent_socket, **load))["rate"])
    return [at_least("fetch_jwt_svid_warm", max(values), "calls/s", max(limits), JWT_SHARE)]


async def first_fetch_x509_svid(house: House, seconds: float) -> list[Item]:
    """Milliseconds from connecting to the first message, for processes that the agent has never seen."""
    socket = house.socket("stream")
    async with house.program("newcomer") as newcomer:
        size = (await first(newcomer, house.agent_socket, 5))["size"]
        async with house.bare("stream", "--socket", socket, "--answer", str(size)):
            await first(newcomer, socket, 5)
            return await side_by_side(
                "first_fetch_x509_svid", seconds, (newcomer, house.agent_socket), (newcomer, socket)
            )


async def side_by_side(name: str, seconds: float, ours: tuple[Process, str], limit: tuple[Process, str]) -> list[Item]:
    """New processes of a program at our socket, beside those at the limit's, in turns: what the machine does else hits both.

    Twice: by frames, which is what the agent takes, and with gRPC's own library on their side (``_by_grpcio``). The difference of
    the two limits is what the library takes.
    """
    each = max(20, int(NEWCOMERS * min(1.0, seconds / 4))) // ROUNDS
    items = []
    for bare, suffix in ((True, ""), (False, "_by_grpcio")):
        took: list[float] = []
        least: list[float] = []
        for _ in range(ROUNDS):
            least += (await first(*limit, each, bare=bare))["ms"]
            took += (await first(*ours, each, bare=bare))["ms"]
        for percent, most in ((50, P50_MS), (99, P99_MS)):
            at, value, of = f"{name}{suffix}_p{percent}", percentile(took, percent), percentile(least, percent)
            items.append(within(at, value, "ms", of, most) if bare else at_most(at, value, "ms", of, LIBRARY_TIMES))
    return items


async def first(newcomer: Process, socket: str, count: int, *, bare: bool = False) -> Mapping[str, Any]:
    """So many new processes at a socket, one after the other; ``ms`` of each, and the answer's ``size``.

    ``bare``: without gRPC's library on their side.
    """
    return await newcomer.do("first", socket=socket, path=X509_PATH, count=count, pause=NEWCOMER_PAUSE, bare=bare)
