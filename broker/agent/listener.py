"""The agent's two sockets: the kernel says who calls, the guard says what an error looks like, the services answer.

On the public one every method but those of health, reflection and Envoy's secret discovery needs the security header, exactly
once, before anything else is looked at. The admin one is for root and the agent's own user; of its services delegates may
use theirs.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from broker._proto.broker.agent.v1 import actions_pb2, admin_pb2, feed_pb2, tasks_pb2
from broker._proto.envoy.service.secret.v3 import sds_pb2
from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.service import ServiceBinding, handler, service_names
from broker._proto.spiffe import workload_pb2
from broker._proto.spire.api.agent.debug.v1 import debug_pb2
from broker._proto.spire.api.agent.delegatedidentity.v1 import delegatedidentity_pb2
from broker._proto.spire.api.agent.logger.v1 import logger_pb2
from broker.agent.api import reflection
from broker.agent.api.health import HealthApi
from broker.agent.denials import NO_USER, Denials
from broker.agent.refusal_log import RefusalLog
from broker.agent.workloads import ATTESTATION_FAILED_CODE, AdminCaller, Caller, Workloads
from broker.clock import SystemClock
from broker.errors import BrokerError, Invalid, NotAttested, Refused
from broker.telemetry.log import get_logger
from broker.transport.acceptor import connection_room
from broker.transport.call_room import MAX_CALLS, CallRoom
from broker.transport.callers import CallerIndex
from broker.transport.grpc_server import CallGuard, Metadata, PrivateGrpcServer
from broker.transport.peercred import KernelPeer
from broker.transport.unix_listener import MAX_CONNECTIONS, UnixListener

WORKLOAD: Final = ServiceBinding.of(workload_pb2.DESCRIPTOR, "SpiffeWorkloadAPI")
TASKS: Final = ServiceBinding.of(tasks_pb2.DESCRIPTOR, "Tasks")
ACTIONS: Final = ServiceBinding.of(actions_pb2.DESCRIPTOR, "Actions")
ADMIN: Final = ServiceBinding.of(admin_pb2.DESCRIPTOR, "Admin")
FEED: Final = ServiceBinding.of(feed_pb2.DESCRIPTOR, "Feed")
HEALTH: Final = ServiceBinding.of(health_pb2.DESCRIPTOR, "Health")
SDS: Final = ServiceBinding.of(sds_pb2.DESCRIPTOR, "SecretDiscoveryService")
DELEGATED: Final = ServiceBinding.of(delegatedidentity_pb2.DESCRIPTOR, "DelegatedIdentity")
DEBUG: Final = ServiceBinding.of(debug_pb2.DESCRIPTOR, "Debug")
LOGGER: Final = ServiceBinding.of(logger_pb2.DESCRIPTOR, "Logger")

WITHOUT_HEADER: Final = frozenset(
    method.path for binding in (HEALTH, SDS, reflection.V1, reflection.V1ALPHA) for method in binding.methods.values()
)
IDENTITY: Final = "agent-identity"
CONNECTION: Final = "server-connection"
"""Parts of the agent whose health is told beside the services': its own SVID, and whether the server is heard."""
SECURITY_HEADER: Final = "workload.spiffe.io"  # SPIFFE_Workload_Endpoint section 3
SOCKET_MODE: Final = 0o777  # whoever may connect is told apart by the kernel, not by permissions
ADMIN_MODE: Final = 0o600
DELEGATES_MODE: Final = 0o666  # outside the private directory: who may connect is told apart as on the workload socket
MAX_OPERATORS: Final = 64  # people and their scripts
_log = get_logger("agent.listener")
MAX_DELEGATES: Final = 1024  # connections: a delegate has one, with a stream for each workload
FDS_PER_PROCESS: Final = 8  # the connection's four, and the descriptors of /proc and pidfd that attestation holds


def require_security_header(path: str, metadata: Metadata) -> None:
    """Refuse a call without ``workload.spiffe.io: true``, exactly once; probes, tools and Envoy need none. Raises Invalid."""
    if path in WITHOUT_HEADER:
        return
    if [value for name, value in metadata if name == SECURITY_HEADER] != ["true"]:
        raise Invalid("security header missing from request", code="security_header_missing")


class PublicSocket:
    """The listener and the private gRPC server behind it. ``async with`` serves."""

    def __init__(
        self,
        path: Path,
        private: Path,
        workloads: Workloads,
        services: Mapping[str, object],
        *,
        is_ready: Callable[[], bool],
        parts: Mapping[str, Callable[[], bool]],
        denials: Denials,
    ) -> None:
        """``services``: an object per full service name of WORKLOAD, TASKS, ACTIONS, FEED and SDS; ``private``: for the gRPC socket.

        ``parts``: what else health is asked of, by name.
        """
        self._denials = denials
        self._cut_logs: dict[str, RefusalLog] = {}  # by code: a small closed set
        served: dict[ServiceBinding, object] = {
            binding: services[binding.name]
            for binding in (WORKLOAD, TASKS, ACTIONS, FEED, SDS)
            if binding.name in services
        }
        served[HEALTH] = HealthApi(service_names(served), is_ready, parts)
        tools = (reflection.V1, reflection.V1ALPHA)
        public = reflection.Catalogue(service_names((*served, *tools)), (one.file for one in (*served, *tools)))
        served |= {binding: reflection.ReflectionApi(public, binding) for binding in tools}
        index: CallerIndex[Caller] = CallerIndex()
        # Everybody who can connect may call; what each is given depends on what was attested.
        access = {method.path: _anybody for binding in served for method in binding.methods.values()}
        guard = CallGuard(
            index,
            access,
            preflight=require_security_header,
            on_refusal=self._call_refused,
            is_refusal=is_refusal,
            room=CallRoom(MAX_CALLS),
            holder_of=lambda caller: caller.process.uid,
        )
        handlers = [handler(binding, service, guard) for binding, service in served.items()]
        self._grpc = PrivateGrpcServer(private / "s", handlers)
        self._listener = UnixListener(
            path,
            mode=SOCKET_MODE,
            backend=self._grpc.path,
            index=index,
            admit=workloads.admit,
            on_closed=workloads.closed,
            on_refusal=self._cut_off,
            max_connections=connection_room(MAX_CONNECTIONS, FDS_PER_PROCESS),
        )
        workloads.drop = self._listener.drop

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return self._listener.connections

    async def start(self) -> None:
        """Serve; raises Misconfigured where the socket cannot be made safely."""
        await self._grpc.start()
        try:
            await self._listener.start()
        except BaseException:
            await self._grpc.stop(0)
            raise

    async def stop(self, grace: float) -> None:
        """Take no more callers, let calls end for ``grace`` seconds, then end them."""
        await self._listener.stop()
        await self._grpc.stop(grace)

    def _call_refused(self, path: str, caller: Caller | None, error: BrokerError) -> Mapping[str, str]:
        if caller is None or (caller.session is not None and caller.session.has_exited):
            # Its connection ended before the call was looked at, or its process, as processes do: nobody hears the answer.
            return {}
        return {"denial": self._denials.record(path, caller, error)}

    def _cut_off(self, error: BrokerError, peer: KernelPeer | None) -> None:
        # Nobody is told an id that could be asked about: a line for each cause is enough, whatever the flood.
        self._denials.count(error, peer.uid if peer is not None else NO_USER)
        log = self._cut_logs.setdefault(error.reason, RefusalLog(_log, SystemClock(), lines=1))
        log(
            "connection_refused",
            code=error.reason,
            reason=error.message,
            hint=error.hint,
            pid=peer.pid if peer is not None else None,
            uid=peer.uid if peer is not None else None,
        )


class AdminSocket:
    """The operator's socket, and the delegates'. In the private directory only the agent's user and root come to it."""

    def __init__(
        self,
        path: Path,
        private: Path,
        workloads: Workloads,
        services: Mapping[str, object],
        *,
        for_delegates: bool,
        is_private: bool,
    ) -> None:
        """``private``: for the gRPC socket, for this alone. Made after the public socket.

        ``services``: an object per full service name of ADMIN, DEBUG, LOGGER and DELEGATED. ``for_delegates``: whether other users
        may connect. ``is_private``: whether the socket lies in the private directory.
        """
        index: CallerIndex[AdminCaller] = CallerIndex()
        self._workloads = workloads
        self._for_delegates = for_delegates
        bindings = (ADMIN, DEBUG, LOGGER, DELEGATED)
        access = {
            method.path: _anybody if binding is DELEGATED else require_operator
            for binding in bindings
            for method in binding.methods.values()
        }
        guard = CallGuard(index, access, room=CallRoom(MAX_CALLS), holder_of=lambda caller: caller.uid)
        self._grpc = PrivateGrpcServer(private / "s", [handler(one, services[one.name], guard) for one in bindings])
        self._listener = UnixListener(
            path,
            mode=ADMIN_MODE if is_private else DELEGATES_MODE,
            directory_mode=0o700 if is_private else 0o755,
            backend=self._grpc.path,
            index=index,
            admit=self._admit,
            on_closed=self._closed,
            max_connections=connection_room(MAX_DELEGATES if for_delegates else MAX_OPERATORS, FDS_PER_PROCESS),
        )
        self._drop_public = workloads.drop
        workloads.drop = self._drop

    def _admit(self, peer: KernelPeer) -> AdminCaller:
        is_operator = peer.uid in {0, os.geteuid()}
        if not is_operator and not self._for_delegates:
            raise Refused("only root and the agent's own user may ask here", code="access_denied")
        try:
            return AdminCaller(peer.uid, self._workloads.admit(peer))
        except NotAttested:
            # An operator is known by user alone, from whatever namespace.
            if not is_operator:
                raise
            return AdminCaller(peer.uid)

    def _closed(self, caller: AdminCaller) -> None:
        if caller.workload is not None:
            self._workloads.closed(caller.workload)

    def _drop(self, predicate: Callable[[Caller], bool]) -> None:
        self._drop_public(predicate)
        self._listener.drop(lambda caller: caller.workload is not None and predicate(caller.workload))

    async def start(self) -> None:
        """Serve; raises Misconfigured where the socket cannot be made safely."""
        await self._grpc.start()
        try:
            await self._listener.start()
        except BaseException:
            await self._grpc.stop(0)
            raise

    async def stop(self, grace: float) -> None:
        """Take no more callers, let calls end for ``grace`` seconds, then end them."""
        await self._listener.stop()
        await self._grpc.stop(grace)


def require_operator(caller: AdminCaller) -> None:
    """Raise Refused for any user but root and the agent's own."""
    if caller.uid not in {0, os.geteuid()}:
        raise Refused("only root and the agent's own user may ask here", code="access_denied")


def is_refusal(error: BrokerError) -> bool:
    """Say whether a caller was refused: also where attestation failed, which it may try again."""
    return isinstance(error, Refused) or error.reason == ATTESTATION_FAILED_CODE


def _anybody(caller: object) -> None:
    del caller
