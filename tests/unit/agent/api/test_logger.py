"""The agent's log level at the admin socket, by SPIRE's service, and at no other."""

import grpc
import pytest

from broker._proto.service import Stub
from broker._proto.spire.api.agent.logger.v1 import logger_pb2
from broker._proto.spire.api.types import logger_pb2 as types_pb2
from broker.agent.listener import LOGGER
from broker.telemetry.log import LEVELS
from tests.fakes.running_agent import estate


async def test_the_log_level_changes_and_comes_back() -> None:
    async with estate() as agent, grpc.aio.insecure_channel(f"unix:{agent.settings.admin_socket_path}") as channel:
        stub = Stub(channel, LOGGER)
        at_start = (await stub.GetLogger(logger_pb2.GetLoggerRequest())).launch_level
        try:
            now = await stub.SetLogLevel(logger_pb2.SetLogLevelRequest(new_level=types_pb2.ERROR))
            assert (now.current_level, now.launch_level) == (types_pb2.ERROR, at_start)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.SetLogLevel(logger_pb2.SetLogLevelRequest(new_level=9))
            assert refused.value.details() == "unsupported log level"
            assert (await stub.ResetLogLevel(logger_pb2.ResetLogLevelRequest())).current_level == at_start
        finally:
            LEVELS.current = LEVELS.at_start


async def test_the_workload_socket_does_not_serve_it() -> None:
    async with estate() as agent, agent.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await Stub(channel, LOGGER).GetLogger(logger_pb2.GetLoggerRequest())
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
