"""The server, put together: store, keys, authorities, both halves, listeners. Only wiring; nothing is decided here."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.clock import Clock, SystemClock
from broker.errors import BrokerError, Misconfigured
from broker.server import failpoints
from broker.server.admin_services import admin_services
from broker.server.api.access import Access
from broker.server.api.http.app import create_app
from broker.server.api.http.direct import DirectApp
from broker.server.api.http.discovery import Discovery
from broker.server.authority.authorities import Authorities
from broker.server.authority.server_svid import ServerNames, ServerSvid
from broker.server.doors import Doors, require_ports
from broker.server.identity_half import IdentityHalf, identity_half
from broker.server.key_room import key_room
from broker.server.operations import Operations
from broker.server.settings import ServerSettings
from broker.server.stillness import Stillness
from broker.server.store.ports import Store, making_nothing_due
from broker.server.store.rows import Node
from broker.server.store.stores import open_store
from broker.server.tasks.feed import announce_keys
from broker.server.tasks_half import TasksHalf, tasks_half
from broker.spiffe import SpiffeId
from broker.telemetry.log import get_logger
from broker.telemetry.metrics import Metrics
from broker.transport.hardening import harden, settle
from broker.transport.tls import SvidPeer
from broker.transport.tls_listener import TlsListener
from broker.version import __version__

SWEEP_EVERY: Final = 60.0
"""Seconds between two sweeps of the store: what is swept has expired, so nobody waits for it."""
SWEEP_LIMIT: Final = 500
"""Rows of each kind in one sweep: others wait for that transaction."""
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
    require_ports(settings)
    workers = stack.enter_context(ThreadPoolExecutor(SIGNERS, thread_name_prefix="signing"))
    room = await key_room(settings, store, clock, stack, on_task_keys=announce_keys(clock))
    authorities = room.authorities
    try:
        svid = _server_svid(settings, authorities, clock)
        identity = await identity_half(settings, store, clock, room=room, workers=workers, metrics=running.metrics)
        tasks = await _tasks_half(settings, store, clock, identity, running.metrics)
    except BrokerError:
        await room.withdraw()
        raise
    if tasks:
        stack.push_async_callback(tasks.close)
    services = [*identity.services(), *(tasks.services() if tasks else ())]
    doors = Doors(
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
    listener = await doors.open_tls(clock, identity.federated, svid, DirectApp(app), tasks.refusals if tasks else None)
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


def _server_svid(settings: ServerSettings, authorities: Authorities, clock: Clock) -> ServerSvid:
    svid = ServerSvid(
        authorities,
        clock,
        settings.private_dir,
        trust_domain=settings.trust_domain,
        names=ServerNames.of(settings.issuer, settings.bind_address),
        ttl=settings.agent_ttl,
    )
    svid.start()
    return svid


async def _tasks_half(
    settings: ServerSettings, store: Store, clock: Clock, identity: IdentityHalf, metrics: Metrics
) -> TasksHalf | None:
    if "tasks" not in settings.roles:
        return None
    return await tasks_half(
        settings,
        store,
        clock,
        authorities=identity.room.authorities,
        directory=identity.directory,
        bundles=lambda: identity.federated.trusted,
        metrics=metrics,
    )


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
        settle()
        stopped = asyncio.create_task(stop.wait())
        waited: set[asyncio.Future[Any]] = {stopped, running.failed}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        log.info("server_stopping")
        if running.failed.done():
            running.failed.result()
