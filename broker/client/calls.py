"""One call to a server: its deadline, and its failure as this product's error.

The channel is the caller's: the admin Unix socket (:mod:`broker.client.dial`), or mutual TLS by an admin workload.
"""

from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from broker._proto.service import ServiceBinding, Stub
from broker._proto.spire.api.types import spiffeid_pb2, status_pb2
from broker.errors import BrokerError, Conflict, Invalid, NotFound, Refused, Unavailable
from broker.spiffe import SpiffeId
from broker.transport.rpc_errors import from_rpc_error

DEADLINE_SECONDS = 10.0
"""For one call, unless the caller says otherwise: an admin call is a transaction and some signatures."""

PAGE_SIZE = 500
"""Items asked for at once: far below the message limit even with long selectors."""

_STATUS: Mapping[int, type[BrokerError]] = {
    grpc.StatusCode.INVALID_ARGUMENT.value[0]: Invalid,
    grpc.StatusCode.NOT_FOUND.value[0]: NotFound,
    grpc.StatusCode.ALREADY_EXISTS.value[0]: Conflict,
    grpc.StatusCode.ABORTED.value[0]: Conflict,
    grpc.StatusCode.PERMISSION_DENIED.value[0]: Refused,
    grpc.StatusCode.FAILED_PRECONDITION.value[0]: Refused,
    grpc.StatusCode.UNAVAILABLE.value[0]: Unavailable,
}


class Caller:
    """Calls one service over one channel; ``timeout`` is in seconds, for each call."""

    def __init__(
        self, channel: grpc.aio.Channel, binding: ServiceBinding, *, timeout: float = DEADLINE_SECONDS
    ) -> None:
        """Prepare; nothing is dialled before the first call."""
        self._stub = Stub(channel, binding)
        self._timeout = timeout

    async def call(self, method: str, request: Message) -> Any:
        """Make one unary call; raises the BrokerError that the server meant, Unavailable when it does not answer."""
        try:
            return await getattr(self._stub, method)(request, timeout=self._timeout)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None


def require_ok(status: status_pb2.Status, what: str) -> None:
    """Refuse an item of a batch that failed, as the error its status stands for."""
    if status.code != grpc.StatusCode.OK.value[0]:
        raise _STATUS.get(status.code, BrokerError)(f"{what}: {status.message or 'failed'}")


def spiffe_id_message(identity: SpiffeId) -> spiffeid_pb2.SPIFFEID:
    """Give the two-part form of the wire."""
    return spiffeid_pb2.SPIFFEID(trust_domain=identity.trust_domain.name, path=identity.path)


def spiffe_id_text(message: spiffeid_pb2.SPIFFEID) -> str:
    """Give the URI of the wire's two-part form."""
    return f"spiffe://{message.trust_domain}{message.path}" if message.trust_domain else ""
