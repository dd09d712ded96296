"""The server, put together: store, keys, authorities, both halves, listeners. Only wiring; nothing is decided here."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette

from broker._proto.service import handler
from broker.audit.events import Event, FieldValue, Record
from broker.clock import Clock, SystemClock
from broker.errors import BrokerError, Misconfigured
from broker.server import failpoints
from broker.server.admin_services import admin_services
from broker.server.api.access import Access, Caller, LocalPeer, admit_local
from broker.server.api.grpc.spire_details import detailed
from broker.server.api.http.app import create_app
from broker.server.api.http.discovery import Discovery
from broker.server.authority.authorities import Authorities
from broker.server.authority.server_svid import ServerNames, ServerSvid
from broker.server.bundle_endpoint import bundle_endpoint
from broker.server.identity.federated import Federated
from broker.server.identity_half import IdentityHalf, Service, identity_half
from broker.server.key_room import key_room
from broker.server.operations import Operations
from broker.server.settings import ServerSettings
from broker.server.stillness import Stillness
from broker.server.store.ports import Store, making_nothing_due
from broker.server.store.rows import Node
from broker.server.store.stores import open_store
from broker.server.tasks.feed import announce_keys
from broker.server.tasks.refusals import Refusals
from broker.server.tasks_half import TasksHalf, tasks_half
from broker.spiffe import SpiffeId
from broker.telemetry.log import get_logger
from broker.telemetry.metrics import Metrics
from broker.transport.callers import CallerIndex
from broker.transport.grpc_server import CallGuard, PrivateGrpcServer
from broker.transport.hardening import harden
from broker.transport.tls import ContextSource, SvidPeer, TlsPeer, roots_of, server_context
from broker.transport.tls_listener import TlsListener
from broker.transport.unix_listener import UnixListener
from broker.version import __version__

PING_EVERY: Final = 30.0
"""Seconds of silence after which a peer on the network is asked whether it lives."""
SWEEP_EVERY: Final = 60.0
"""Seconds between two sweeps of the store: what is swept has expired, so nobody waits for it."""
SWEEP_LIMIT: Final = 500
"""Rows of each kind in one sweep: others wait for that transaction."""
STOP_GRACE: Final = 1.0
"""Seconds that calls in progress have to end when the server stops; streams never end by themselves."""
SIGNERS: Final = 1
"""Threads for batches of signatures: the work holds the interpreter most of the time, more would only take turns."""

log = get_logger("server")


class Server:
    """A running server, for whoever started it."""

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.is_ready = False
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._port = 0
        self.bundle_port = 0
        """The bundle endpoint's port that was bound; 0 without one."""

    @property
    def port(self) -> int:
        """The TLS port that was bound."""
        return self._port

    @property
    def socket_path(self) -> Path:
        """The admin socket."""
        return self.settings.socket_path


@asynccontextmanager
async def server(
    settings: ServerSettings, *, clock: Clock | None = None, environ: Mapping[str, str] = os.environ
) -> AsyncIterator[Server]:
    """Run a server for as long as the block lasts; ready when it begins. Raises Misconfigured, Unavailable."""
    clock = clock or SystemClock()
    failpoints.arm(environ.get(failpoints.VARIABLE, ""), allowed=settings.allow_failpoints)
    if "identity" not in settings.roles:
        raise Misconfigured(
            'a replica with roles = ["tasks"] needs another server\'s identity half, which is not built yet',
            code="roles_not_supported",
            hint='leave roles = ["identity", "tasks"]',
        )
    async with AsyncExitStack() as stack:
        yield await _assemble(settings, clock, stack)


async def _assemble(settings: ServerSettings, clock: Clock, stack: AsyncExitStack) -> Server:
    running = Server(settings, Metrics("server"))
    _make_directories(settings)
    store = await stack.enter_async_context(open_store(settings.database_url.get_secret_value(), clock=clock))
    workers = stack.enter_context(ThreadPoolExecutor(SIGNERS, thread_name_prefix="signing"))
    room = await key_room(settings, store, clock, stack, on_task_keys=announce_keys(clock))
    authorities = room.authorities
    svid = ServerSvid(
        authorities,
        clock,
        settings.private_dir,
        trust_domain=settings.trust_domain,
        names=ServerNames.of(settings.issuer, settings.bind_address),
        ttl=settings.agent_ttl,
    )
    svid.start()
    identity = await identity_half(settings, store, clock, room=room, workers=workers, metrics=running.metrics)
    tasks: TasksHalf | None = None
    if "tasks" in settings.roles:
        tasks = await tasks_half(
            settings,
            store,
            clock,
            authorities=authorities,
            directory=identity.directory,
            bundles=lambda: identity.federated.trusted,
            metrics=running.metrics,
        )
        stack.push_async_callback(tasks.close)
    services = [*identity.services(), *(tasks.services() if tasks else ())]
    doors = _Doors(
        settings,
        services,
        Access(settings.trust_domain, identity.directory, identity.nodes, frozenset(settings.admin_ids)),
        stack,
    )
    await doors.open_admin(
        admin_services(
            services,
            is_ready=lambda: running.is_ready,
            directory=identity.directory,
            clock=clock,
            identity=svid.identity,
            bundles=lambda: authorities.bundles,
            count_bundles=identity.bundles.count,
        )
    )
    app = create_app(tasks.http if tasks else None, Discovery(settings.issuer, lambda: authorities.bundle))
    listener = await doors.open_tls(clock, identity.federated, svid, app, tasks.refusals if tasks else None)
    running.bundle_port = await doors.open_bundle_endpoint(clock, authorities, svid)
    running._port = listener.port  # noqa: SLF001  # the same module
    _keep_in_step(listener, authorities, identity)
    await store.write(lambda writer: writer.record(_started(settings, store.id, clock.now())))
    loops = [
        *room.loops(),
        svid.run(),
        *([] if tasks else [_housekeeping(store, clock)]),  # the task half sweeps by itself, and more often
        *identity.loops(),
        *(tasks.loops() if tasks else ()),
    ]
    await stack.enter_async_context(_background(loops, running))
    await _open_operations(settings, running, store, stack)
    running.is_ready = True
    stack.callback(_not_ready, running)
    log.info("server_ready", trust_domain=settings.trust_domain.name, port=listener.port, store=store.id)
    return running


@dataclass(frozen=True, slots=True)
class _Doors:
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
        self, clock: Clock, federated: Federated, svid: ServerSvid, http_app: Starlette, refusals: Refusals | None
    ) -> TlsListener:
        """Open the TLS port; connections that are refused are recorded where the task half keeps refusals."""

        def refused(error: BrokerError, address: str) -> None:
            log.info("connection_refused", code=error.reason, address=address)
            if refusals is not None:
                refusals.connection(error.reason, address)

        index: CallerIndex[TlsPeer] = CallerIndex()
        guard = detailed(CallGuard(index, self.access.checks(), on_refusal=_log_refusal))
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


async def _open_operations(settings: ServerSettings, running: Server, store: Store, stack: AsyncExitStack) -> None:
    if settings.operations.enabled:
        where = settings.operations
        checks = {"server": lambda: running.is_ready, "store": lambda: store.is_current}
        port = Operations(where.bind_address, where.bind_port, running.metrics, checks)
        await port.start()
        stack.push_async_callback(port.stop)


def _keep_in_step(listener: TlsListener, authorities: Authorities, identity: IdentityHalf) -> None:
    """Close connections whose authority, or whose agent, is gone."""

    def on_node(agent_id: SpiffeId, node: Node | None) -> None:
        if node is None or node.banned:
            listener.drop(lambda peer: isinstance(peer, SvidPeer) and peer.svid.id == agent_id)

    authorities.subscribe(lambda: _recheck(listener))
    identity.federated.subscribe(lambda _kind, _trust_domain: _recheck(listener))
    identity.directory.on_node(on_node)


def _recheck(listener: TlsListener) -> None:
    closed = listener.recheck()
    if closed:
        log.info("connections_closed", count=closed, reason="svid_not_valid")


@asynccontextmanager
async def _background(loops: Iterable[Coroutine[Any, Any, None]], running: Server) -> AsyncIterator[None]:
    """Run loops beside the block; one that fails fails the server, it is never lost silently."""

    def done(task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not running.failed.done():
            running.is_ready = False
            running.failed.set_exception(error)

    tasks = [asyncio.create_task(loop, name="broker-loop") for loop in loops]
    for task in tasks:
        task.add_done_callback(done)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Whoever waits for a failure waits no longer.
        if not running.failed.done():
            running.failed.cancel()
        elif not running.failed.cancelled():
            running.failed.exception()


async def _housekeeping(store: Store, clock: Clock) -> None:
    """Let the store forget what nobody can ask for any more, until cancelled. One in which nothing changes is left alone."""
    stillness = Stillness(store, clock)
    while True:
        await asyncio.sleep(SWEEP_EVERY)
        try:
            while stillness.may_have_ended():
                sweep = making_nothing_due(lambda writer: writer.sweep(clock.now(), SWEEP_LIMIT))
                if await store.write(sweep) < SWEEP_LIMIT:
                    stillness.looked(None)
                    break
        except BrokerError as error:
            log.warning("store_not_swept", code=error.reason, error=error.message)


def _started(settings: ServerSettings, store_id: str, now: datetime) -> Record:
    fields: dict[str, FieldValue] = {"version": __version__, "store": store_id, "roles": sorted(settings.roles)}
    return Record(Event.SERVER_STARTED, now, "server", settings.trust_domain.name, fields)


def _make_directories(settings: ServerSettings) -> None:
    try:
        for directory, mode in (
            (settings.data_dir, 0o700),
            (settings.runtime_dir, 0o755),
            (settings.private_dir, 0o700),
        ):
            directory.mkdir(mode=mode, parents=True, exist_ok=True)
        facts = settings.private_dir.lstat()
        if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise Misconfigured(
                f"{settings.private_dir} is not this user's alone",
                code="directory_unsafe",
                hint="chown it to the server's user and chmod it 0700",
            )
    except OSError as error:
        raise Misconfigured(
            f"{error.filename}: {error.strerror}", code="directory_unavailable", hint="set data_dir and runtime_dir"
        ) from error


def _log_refusal(path: str, caller: Caller | None, error: BrokerError) -> None:
    log.info("call_refused", method=path, code=error.reason, peer=type(caller).__name__)


def _not_ready(running: Server) -> None:
    running.is_ready = False


async def run(settings: ServerSettings, *, environ: Mapping[str, str] = os.environ) -> None:
    """Run a server, as a process of its own, until SIGTERM or SIGINT; raises Misconfigured, Unavailable, or what a part of it failed with."""
    harden()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with server(settings, environ=environ) as running:
        stopped = asyncio.create_task(stop.wait())
        waited: set[asyncio.Future[Any]] = {stopped, running.failed}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        log.info("server_stopping")
        if running.failed.done():
            running.failed.result()
