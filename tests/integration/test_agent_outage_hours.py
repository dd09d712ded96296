"""An agent whose server is away for hours, by clocks that are moved: real server, real agent, real sockets. O01 itself."""

import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509

from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import WORKLOAD
from broker.server.settings import KeySettings
from broker.spiffe.certificates import split_der
from broker.spiffe.jose import parse_compact
from tests.fakes.processes import held_connection
from tests.fakes.running_agent import HEADER, RunningAgent, until
from tests.fakes.small_estate import TD, leaf_of, running_agent, running_server

HOUR, SECOND = timedelta(hours=1), timedelta(seconds=1)
AWAY = 4 * HOUR


class StandingClock:
    """The machine's wall clock, until it is set: then it stands."""

    def __init__(self) -> None:
        self._stands_at: datetime | None = None

    def now(self) -> datetime:
        return self._stands_at or datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def set(self, moment: datetime) -> None:
        self._stands_at = moment


async def of_another_process(agent: RunningAgent, number: int) -> workload_pb2.X509SVID:
    async with (
        held_connection(agent.socket, agent.directory / f"r{number}", "stay") as held,
        grpc.aio.insecure_channel(f"unix:{held.relay}", options=(("grpc.use_local_subchannel_pool", 1),)) as channel,
    ):
        call = Stub(channel, WORKLOAD).FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER, timeout=30)
        return (await call.read()).svids[0]


async def are_unavailable(*attempts) -> None:
    for attempt in attempts:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await attempt
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def bundles_are_there(agent: RunningAgent) -> None:
    async with agent.workload() as stub:
        for method, request in (
            ("FetchX509Bundles", workload_pb2.X509BundlesRequest()),
            ("FetchJWTBundles", workload_pb2.JWTBundlesRequest()),
        ):
            message = await getattr(stub, method)(request, metadata=HEADER, timeout=30).read()
            assert message.bundles[f"spiffe://{TD.name}"]


async def validated(agent: RunningAgent, token: str) -> str:
    async with agent.workload() as stub:
        request = workload_pb2.ValidateJWTSVIDRequest(audience="a", svid=token)
        return (await stub.ValidateJWTSVID(request, metadata=HEADER, timeout=30)).spiffe_id


@pytest.mark.bears("O01")
@pytest.mark.parametrize("hours", [1, 8])
async def test_a_server_that_is_away_for_four_hours(directory, hours) -> None:
    clock = StandingClock()
    kept = {
        "clock": clock, "keys": KeySettings(manager="disk"), "agent_ttl": 12 * HOUR,
        "default_x509_svid_ttl": hours * HOUR, "default_jwt_svid_ttl": hours * HOUR,
    }  # fmt: skip
    async with AsyncExitStack() as stack:
        before = AsyncExitStack()
        server = await before.enter_async_context(running_server(directory, **kept))
        agent = await stack.enter_async_context(running_agent(server, directory, clock=clock))
        await server.register(agent.agent.node.id.path, "/wl/me")
        began = clock.now()
        mine, token = (await agent.x509()).svids[0], (await agent.jwt("a")).svids[0].svid
        await until(agent.agent.svids.spares.kept)
        port = server.server.port
        await before.aclose()
        await until(lambda: not agent.agent.sync.is_online)
        expires = datetime.fromtimestamp(int(str(parse_compact(token).payload["exp"])), UTC)
        ends = sorted((expires, leaf_of(mine).not_valid_after_utc))

        for number, moment in enumerate((began + HOUR / 2, min(ends[0] - SECOND, began + AWAY))):
            clock.set(moment)
            assert (await agent.x509()).svids[0] == mine
            assert (await agent.jwt("a")).svids[0].svid == token
            assert await validated(agent, token) == mine.spiffe_id
            assert (await of_another_process(agent, number)).spiffe_id == mine.spiffe_id
            await bundles_are_there(agent)
            await are_unavailable(agent.jwt("new"))
        for moment in (ends[1], began + AWAY) if ends[1] < began + AWAY else ():
            clock.set(moment)
            await are_unavailable(agent.x509(), agent.jwt("a"))
            await bundles_are_there(agent)
        assert clock.now() == began + AWAY

        await stack.enter_async_context(running_server(directory, bind_port=port, **kept))
        await until(lambda: agent.agent.sync.is_online, 30)
        again = (await agent.x509()).svids[0]
        assert len(split_der(again.x509_svid)) == 1
        assert leaf_of(again).not_valid_after_utc > clock.now()
        assert x509.load_der_x509_certificate(again.bundle) == x509.load_der_x509_certificate(mine.bundle)
