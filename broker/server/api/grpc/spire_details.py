"""SPIRE's detail of a refusal: it tells SPIRE's agent whether to attest anew, to renew again, or to stop.

Our own agent reads the stable code in ErrorInfo. SPIRE's agent knows only ``PermissionDeniedDetails``, so a refusal of
an agent carries both. Wrapped around the guard, where the status is already made.
"""

import inspect
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Final, NoReturn

import grpc

from broker._proto.google.protobuf import any_pb2
from broker._proto.google.rpc import error_details_pb2, status_pb2
from broker._proto.service import Behaviour, Context, Wrap
from broker._proto.spire.api.types.status_pb2 import PermissionDeniedDetails
from broker.transport.grpc_status import DETAILS_KEY

REASONS: Final[Mapping[str, PermissionDeniedDetails.Reason]] = {
    "agent_expired": PermissionDeniedDetails.AGENT_EXPIRED,
    "agent_not_attested": PermissionDeniedDetails.AGENT_NOT_ATTESTED,
    "agent_not_active": PermissionDeniedDetails.AGENT_NOT_ACTIVE,
    "agent_banned": PermissionDeniedDetails.AGENT_BANNED,
    "agent_must_reattest": PermissionDeniedDetails.AGENT_MUST_REATTEST,
}


class _DetailedContext:
    """A call's context whose refusals also say SPIRE's reason."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """End the call, with the detail where there is one."""
        metadata = tuple((key, _detailed(value) if key == DETAILS_KEY else value) for key, value in trailing_metadata)
        await self._context.abort(code, details, metadata)
        raise AssertionError(details)  # abort always raises


def detailed(wrap: Wrap) -> Wrap:
    """Wrap a guard, so that what it refuses carries SPIRE's detail too."""

    def around(path: str, behaviour: Any, /) -> Behaviour:
        inner: Any = wrap(path, behaviour)
        if inspect.isasyncgenfunction(inner):

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                async with aclosing(inner(request, _DetailedContext(context))) as responses:
                    async for response in responses:
                        yield response

            return stream

        async def unary(request: Any, context: Context) -> Any:
            return await inner(request, _DetailedContext(context))

        return unary

    return around


def _detailed(status_bytes: bytes) -> bytes:
    status = status_pb2.Status.FromString(status_bytes)
    info = error_details_pb2.ErrorInfo()
    for detail in tuple(status.details):
        if detail.Unpack(info) and info.reason in REASONS:
            packed = any_pb2.Any()
            packed.Pack(PermissionDeniedDetails(reason=REASONS[info.reason]))
            status.details.append(packed)
    return status.SerializeToString()
