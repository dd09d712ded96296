"""Reflection: what is public, with everything needed to read it, and nothing else."""

import asyncio

import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool

from broker._proto.service import Stub
from broker.agent.api import reflection
from broker.agent.listener import ACTIONS, ADMIN, FEED, HEALTH, SDS, TASKS, WORKLOAD
from tests.fakes.running_agent import estate

PUBLIC = sorted(one.name for one in (WORKLOAD, TASKS, ACTIONS, FEED, SDS, HEALTH, reflection.V1, reflection.V1ALPHA))


@pytest.mark.bears("W14", "WE-13")
@pytest.mark.parametrize("binding", [reflection.V1, reflection.V1ALPHA], ids=["v1", "v1alpha"])
async def test_a_tool_without_the_header_learns_of_the_public_services_alone(binding) -> None:
    request = binding.methods["ServerReflectionInfo"].request
    async with estate() as agent, agent.workload() as stub:
        del stub
        async with agent.channel() as channel:
            call = Stub(channel, binding).ServerReflectionInfo()

            async def ask(**what):
                await call.write(request(host="h", **what))
                answer = await asyncio.wait_for(call.read(), 30)
                assert answer.original_request == request(host="h", **what)
                return answer

            listed = (await ask(list_services="")).list_services_response.service
            assert [one.name for one in listed] == PUBLIC
            for name in PUBLIC:
                pool = DescriptorPool()
                files = (await ask(file_containing_symbol=name)).file_descriptor_response.file_descriptor_proto
                for raw in reversed(files):  # imports stand behind what imports them
                    pool.Add(FileDescriptorProto.FromString(raw))
                assert pool.FindServiceByName(name).methods
            for hidden in (
                {"file_containing_symbol": ADMIN.name},
                {"file_containing_symbol": "broker.agent.v1.Denial"},
                {"file_by_filename": "broker/agent/v1/admin.proto"},
                {"file_containing_symbol": "spire.api.server.entry.v1.Entry"},
                {"file_containing_extension": {"containing_type": "X", "extension_number": 1}},
                {"all_extension_numbers_of_type": WORKLOAD.name},
                {"file_by_filename": ""},
            ):
                assert (await ask(**hidden)).error_response.error_code == 5, hidden
            await call.done_writing()
            assert await asyncio.wait_for(call.read(), 30) is grpc.aio.EOF
