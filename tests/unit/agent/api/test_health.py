"""Health on the public socket."""

import asyncio

import grpc
import pytest

from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.service import Stub
from broker.agent.listener import ACTIONS, FEED, HEALTH, SDS, TASKS, WORKLOAD
from tests.fakes.running_agent import estate, until

SERVING, NOT_SERVING, UNKNOWN = (
    health_pb2.HealthCheckResponse.ServingStatus.Value(name) for name in ("SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
)


@pytest.mark.bears("W01", "W14")
async def test_it_answers_without_a_header_and_without_an_identity() -> None:
    async with estate() as agent, agent.channel() as channel:
        stub = Stub(channel, HEALTH)
        for service in ("", WORKLOAD.name, TASKS.name, ACTIONS.name, FEED.name):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.Check(health_pb2.HealthCheckRequest(service="other"))
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        listed = await stub.List(health_pb2.HealthListRequest())
        assert set(listed.statuses) == {"", *(one.name for one in (WORKLOAD, TASKS, ACTIONS, FEED, SDS))}
        for part in ("agent-identity", "server-connection"):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=part))).status == SERVING


async def test_it_follows_readiness() -> None:
    async with estate(synced=False, server_port=1) as agent, agent.channel() as channel:
        stub = Stub(channel, HEALTH)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        call = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await call.read()).status == NOT_SERVING
        agent.agent._is_joined = agent.agent.cache.is_synced = True
        assert (await asyncio.wait_for(call.read(), 30)).status == SERVING
        assert (await stub.Watch(health_pb2.HealthCheckRequest(service="other")).read()).status == UNKNOWN
        await until(lambda: True)
