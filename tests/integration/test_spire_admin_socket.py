"""What the admin socket tells of itself to SPIRE's tools: its own chain, its log level, its health, its services."""

import grpc
import pytest

from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.grpc.reflection.v1 import reflection_pb2
from broker._proto.grpc.reflection.v1alpha import reflection_pb2 as alpha_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.server.debug.v1 import debug_pb2
from broker._proto.spire.api.server.logger.v1 import logger_pb2
from broker._proto.spire.api.types import logger_pb2 as logger_types
from broker.server.api.grpc import debug, health, logger
from broker.transport.reflection import V1, V1ALPHA
from tests.integration.identity_rig import (
    DEADLINE,
    admin_channel,
    estate,
    running,
)

__all__ = ["estate"]  # the fixture

from tests.integration.spire_callers import AGENT, BUNDLE, ENTRY, SVID, callers


async def test_debug_tells_the_server_s_own_chain_and_counts(estate):
    async with callers(estate) as here:
        info = await here.stub(debug.BINDING, "local").GetInfo(debug_pb2.GetInfoRequest(), timeout=DEADLINE)
        assert [one.id.path for one in info.svid_chain] == ["/spire/server", ""]
        assert all(one.expires_at for one in info.svid_chain)
        assert (info.agents_count, info.entries_count) == (1, 3)
        assert info.federated_bundles_count == 1
        assert info.uptime >= 0


async def test_the_log_level_changes_and_comes_back(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        stub = Stub(admin, logger.BINDING)
        before = await stub.GetLogger(logger_pb2.GetLoggerRequest(), timeout=DEADLINE)
        assert before == logger_types.Logger(current_level=logger_types.INFO, launch_level=logger_types.INFO)
        try:
            for level in list(logger_types.LogLevel.values())[1:]:
                now = await stub.SetLogLevel(logger_pb2.SetLogLevelRequest(new_level=level), timeout=DEADLINE)
                assert now == logger_types.Logger(current_level=level, launch_level=logger_types.INFO)
        finally:
            after = await stub.ResetLogLevel(logger_pb2.ResetLogLevelRequest(), timeout=DEADLINE)
        assert after == before


async def test_health_lists_every_service(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        listed = await Stub(admin, health.BINDING).List(health_pb2.HealthListRequest(), timeout=DEADLINE)
        assert {"", AGENT, ENTRY, SVID, BUNDLE, "spire.api.server.debug.v1.Debug"} <= set(listed.statuses)
        assert {state.status for state in listed.statuses.values()} == {health_pb2.HealthCheckResponse.SERVING}


@pytest.mark.parametrize(("binding", "messages"), [(V1, reflection_pb2), (V1ALPHA, alpha_pb2)])
async def test_tools_learn_the_services_and_their_messages(estate, binding, messages):
    ask = messages.ServerReflectionRequest
    async with running(estate) as one, admin_channel(one) as admin:
        call = Stub(admin, binding).ServerReflectionInfo(timeout=DEADLINE)
        await call.write(ask(list_services="*"))
        services = {one.name for one in (await call.read()).list_services_response.service}
        assert {AGENT, ENTRY, SVID, BUNDLE, binding.name, "grpc.health.v1.Health"} <= services
        assert "broker.agent.v1.Admin" not in services  # another socket's
        await call.write(ask(file_containing_symbol=ENTRY))
        files = (await call.read()).file_descriptor_response.file_descriptor_proto
        assert any(b"BatchCreateEntry" in one for one in files)
        await call.write(ask(file_containing_symbol="broker.agent.v1.Admin"))
        assert (await call.read()).error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
        await call.done_writing()
