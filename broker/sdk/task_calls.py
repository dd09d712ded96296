"""How the SDK's tasks ask the node agent: one call, its failure as this product's error, and what every request says."""

from typing import TYPE_CHECKING, Any

import grpc

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.service import ServiceBinding, Stub
from broker.sdk.endpoint import CALL_SECONDS, SECURITY_HEADER
from broker.spiffe import strictjson
from broker.transport.rpc_errors import from_rpc_error

if TYPE_CHECKING:
    from broker.sdk.workload import Workload


def tasks_api(workload: "Workload") -> Stub:
    """Give the agent's task service on this workload's channel."""
    return Stub(workload.channel, ServiceBinding.of(tasks_pb2.DESCRIPTOR, "Tasks"))


async def asked(api: Stub, method: str, request: object, *, seconds: float = CALL_SECONDS) -> Any:
    """Make one call; raises the BrokerError that its failure means."""
    try:
        return await getattr(api, method)(request, metadata=SECURITY_HEADER, timeout=seconds)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


def chosen(workload: "Workload") -> str:
    """Give the identity that this workload goes by, empty where it has but one."""
    return str(workload.chosen or "")


def canonical(value: object) -> str:
    """Write a value as the JSON that the wire carries."""
    return strictjson.canonical(value).decode()
