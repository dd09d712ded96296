"""The ways into the server: the admin socket, the TLS port and the bundle endpoint, each opened and closed in its order."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

from starlette.types import ASGIApp

from broker._proto.service import handler
from broker.clock import Clock
from broker.errors import BrokerError
from broker.server.api.access import REQUESTS_IN_MESSAGES, Access, Caller, LocalPeer, admit_local
from broker.server.api.grpc.spire_details import detailed
from broker.server.authority.authorities import Authorities
from broker.server.authority.server_svid import ServerSvid
from broker.server.bundle_endpoint import bundle_endpoint
from broker.server.identity.federated import Federated
from broker.server.identity_half import Service
from broker.server.settings import ServerSettings
from broker.server.tasks.refusals import Refusals
from broker.telemetry.log import get_logger
from broker.transport.callers import CallerIndex
from broker.transport.grpc_server import CallGuard, PrivateGrpcServer
from broker.transport.tls import ContextSource, TlsPeer, roots_of, server_context
from broker.transport.tls_listener import TlsListener, bound_socket
from broker.transport.unix_listener import UnixListener

PING_EVERY: Final = 30.0
"""Seconds of silence after which a peer on the network is asked whether it lives."""
STOP_GRACE: Final = 1.0
"""Seconds that calls in progress have to end when the server stops; streams never end by themselves."""

log = get_logger("server")


def require_ports(settings: ServerSettings) -> None:
    """Raise Misconfigured (``address_unavailable``) for a port that cannot be bound, before authorities are published."""
    wanted = [(settings.bind_address, settings.bind_port)]
    if (endpoint := settings.federation.bundle_endpoint) is not None:
        wanted.append((endpoint.address, endpoint.port))
    if settings.operations.enabled:
        wanted.append((settings.operations.bind_address, settings.operations.bind_port))
    for host, port in wanted:
        bound_socket(host, port).close()


@dataclass(frozen=True, slots=True)
class Doors:
    """The two ways in, over the same services and the same table of who may call what."""

    settings: ServerSettings
    services: Sequence[Service]
    access: Access
    stack: AsyncExitStack

    async def open_admin(self, services: Sequence[Service]) -> None:
        """Open the admin socket."""
        index: CallerIndex[LocalPeer] = CallerIndex()
        guard = CallGuard(index, self.access.checks(), on_refusal=_log_refusal)
        handlers = [handler(binding, service, guard) for binding, service in services]
        backend = PrivateGrpcServer(self.settings.private_dir / "admin-grpc" / "s", handlers)
        await self._start(
            backend,
            UnixListener(
                self.settings.socket_path,
                mode=0o600,
                directory_mode=0o700,
                backend=backend.path,
                index=index,
                admit=admit_local,
            ),
        )

    async def open_tls(
        self, clock: Clock, federated: Federated, svid: ServerSvid, http_app: ASGIApp, refusals: Refusals | None
    ) -> TlsListener:
        """Open the TLS port; connections that are refused are recorded where the task half keeps refusals."""

        def refused(error: BrokerError, address: str) -> None:
            log.info("connection_refused", code=error.reason, address=address)
            if refusals is not None:
                refusals.connection(error.reason, address)

        index: CallerIndex[TlsPeer] = CallerIndex()
        guard = detailed(
            CallGuard(index, self.access.checks(), on_refusal=_log_refusal, asked_each=REQUESTS_IN_MESSAGES)
        )
        handlers = [handler(binding, service, guard) for binding, service in self.services]
        backend = PrivateGrpcServer(self.settings.private_dir / "tls-grpc" / "s", handlers, ping_every=PING_EVERY)
        listener = TlsListener(
            host=self.settings.bind_address,
            port=self.settings.bind_port,
            context=ContextSource(
                svid.identity,
                lambda: federated.trusted,
                lambda identity, bundles: server_context(identity, roots_of(bundles)),
            ),
            # NOTE(security): of all trust domains that are federated with, each judged by its own bundle; what somebody
            # of another may do is the table's to say: nothing but what everybody may.
            bundles=lambda: federated.trusted,
            clock=clock,
            index=index,
            grpc_backend=backend.path,
            http_app=http_app,
            on_refusal=refused,
        )
        await self._start(backend, listener)
        return listener

    async def open_bundle_endpoint(self, clock: Clock, authorities: Authorities, svid: ServerSvid) -> int:
        """Open the bundle endpoint where the settings have one; gives its port, 0 without one."""
        wanted = self.settings.federation.bundle_endpoint
        if wanted is None:
            return 0
        listener = bundle_endpoint(wanted, bundle=lambda: authorities.bundle, svid=svid.identity, clock=clock)
        await listener.start()
        self.stack.push_async_callback(listener.stop)
        log.info("bundle_endpoint_open", port=listener.port, profile=wanted.profile.value)
        return listener.port

    async def _start(self, backend: PrivateGrpcServer, door: TlsListener | UnixListener[LocalPeer]) -> None:
        await backend.start()
        self.stack.push_async_callback(backend.stop)
        await door.start()
        self.stack.push_async_callback(door.stop)
        # Again, so that it comes first: calls end before their connections do.
        self.stack.push_async_callback(backend.stop, STOP_GRACE)


def _log_refusal(path: str, caller: Caller | None, error: BrokerError) -> None:
    log.info("call_refused", method=path, code=error.reason, peer=type(caller).__name__)
