"""The private gRPC server, and the guard around its behaviours: who calls, may they, and what errors look like.

Every call reaches a behaviour with its caller, taken from the connection and from nothing that the caller can write.
A method without a line in the access table is denied. Knows no services.
"""

import asyncio
import inspect
import logging
import os
import stat
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import grpc
import grpc.aio

from broker._proto.service import Behaviour, Context
from broker.errors import BrokerError, Invalid, Misconfigured, Refused
from broker.transport.call_room import CallRoom
from broker.transport.callers import CallerIndex
from broker.transport.grpc_status import (
    DETAILS_KEY,
    MAX_MESSAGE,
    defect_message,
    new_reference,
    place_of,
    status_code,
    status_details,
)
from broker.transport.socket_path import MAX_PATH_BYTES

_LOG = logging.getLogger(__name__)
C = TypeVar("C")
Metadata = Sequence[tuple[str, str | bytes]]

MAX_MESSAGE_BYTES = 4 * 1024 * 1024  # gRPC's usual bound; larger answers are paged
MAX_STREAMS = 256  # of one connection: bounds what its opening and resetting can hold in memory
MAX_PENDING = (
    16_384  # calls that nobody has taken up yet: gRPC's own 1,000 cancels callers of a node that wakes up at once
)
MAX_METADATA_BYTES = 16 * 1024  # of one call, with the 32 bytes for each name that RFC 9113 section 6.5.2 counts
_METADATA_OVERHEAD = 32
SEND_DEADLINE = 30.0  # seconds for a caller to take one message of a stream: a few KiB, and its windows hold dozens
PREFACE_DEADLINE_MS = 10_000  # a connection that does not begin to speak HTTP/2 is closed
SETTINGS_DEADLINE_MS = 60_000  # for its answer to our settings, which may stand behind calls that wait for their turn
MIN_PING_INTERVAL_MS = 10_000  # clients may ask this often whether we live
_IDENTITY_ONLY = 1  # bit set of compression algorithms: none, so that no small message unpacks into a large one


class CallGuard(Generic[C]):
    """The ``wrap`` of :func:`broker._proto.service.handler`: finds the caller, asks the access table, maps errors.

    Behaviours are ``async def Method(self, request, context, caller)`` (or async generators). ``access`` maps full
    method paths (``/broker.server.v1.Watch/Watch``) to a check of the caller that raises Refused; a method without a
    line is denied to everybody. ``preflight(path, metadata)`` runs before the caller is looked at and may raise.
    """

    def __init__(
        self,
        index: CallerIndex[C],
        access: Mapping[str, Callable[[C], None]],
        *,
        preflight: Callable[[str, Metadata], None] | None = None,
        on_refusal: Callable[[str, C | None, BrokerError], Mapping[str, str] | None] | None = None,
        on_defect: Callable[[str, str, BaseException], None] | None = None,
        is_refusal: Callable[[BrokerError], bool] = lambda error: isinstance(error, Refused),
        room: CallRoom | None = None,
        holder_of: Callable[[C], Hashable] = lambda caller: caller,
        asked_each: Collection[str] = (),
    ) -> None:
        """``on_refusal(path, caller, error)`` may give metadata for ErrorInfo; ``is_refusal`` says which errors it hears.

        ``room`` bounds the calls in progress, counted for ``holder_of(caller)``.
        ``on_defect(reference, path, error)`` (default: one line of log). ``asked_each``: paths of streams whose caller is
        checked again before each of its messages, because each is a request of its own.
        """
        self._index = index
        self._asked_each = frozenset(asked_each)
        self._access = access
        self._preflight = preflight
        self._on_refusal = on_refusal
        self._is_refusal = is_refusal
        self._on_defect = on_defect or log_defect
        self._room = room
        self._holder_of = holder_of

    def __call__(self, path: str, behaviour: Any, /) -> Behaviour:
        """Give the behaviour to serve instead: same kind, called by gRPC with (request, context)."""
        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                caller: C | None = None
                peer = context.peer()  # now: asked after the end of the call, gRPC reads freed memory
                try:
                    caller = self._enter(path, context, peer)
                    if path in self._asked_each:
                        request = _asked(request, partial(self._access[path], caller))
                    async with aclosing(behaviour(request, context, caller)) as responses:
                        async for response in responses:
                            self._require_open(peer)
                            with self._taken_in_time(peer):
                                yield response
                except Exception as error:  # noqa: BLE001 - the one place where everything is mapped
                    await self._fail(path, context, peer, caller, error)

            return stream

        async def unary(request: Any, context: Context) -> Any:
            caller: C | None = None
            peer = context.peer()
            try:
                caller = self._enter(path, context, peer)
                response = await behaviour(request, context, caller)
            except Exception as error:  # noqa: BLE001 - the one place where everything is mapped
                await self._fail(path, context, peer, caller, error)
            self._require_open(peer)
            return response

        return unary

    def _enter(self, path: str, context: Context, peer: str) -> C:
        caller = self._index.of(peer)
        metadata = tuple(context.invocation_metadata() or ())
        # gRPC's own limit of metadata does not hold what it says.
        if sum(len(name) + len(value) + _METADATA_OVERHEAD for name, value in metadata) > MAX_METADATA_BYTES:
            raise Invalid(f"metadata is longer than {MAX_METADATA_BYTES} bytes", code="metadata_too_long")
        if self._preflight:
            self._preflight(path, metadata)
        check = self._access.get(path)
        if check is None:
            raise Refused("nobody may call this method", code="method_closed")
        check(caller)
        if self._room is not None:
            holder = self._holder_of(caller)
            self._room.enter(holder)
            context.add_done_callback(partial(self._leave, holder))  # type: ignore[arg-type]  # called with the call alone
        return caller

    def _leave(self, holder: Hashable, call: object) -> None:
        del call
        assert self._room is not None
        self._room.leave(holder)

    @contextmanager
    def _taken_in_time(self, peer: str) -> Iterator[None]:
        """Around the sending of one message of a stream: cuts the connection of a caller that does not read.

        The connection and not the call: what cannot be sent stands before anything that would end the call.
        """
        error = Refused("the caller does not read its stream", code="stream_not_read")
        loop = asyncio.get_running_loop()
        timer = loop.call_later(SEND_DEADLINE, self._index.cut, peer, error)
        try:
            yield
        finally:
            timer.cancel()

    def _require_open(self, peer: str) -> None:
        """End a call as gRPC itself is about to, where its connection is gone: what grpcio cannot send it never frees."""
        if not self._index.is_open(peer):
            raise asyncio.CancelledError

    async def _fail(self, path: str, context: Context, peer: str, caller: C | None, error: Exception) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError | grpc.aio.InternalError):
            raise error  # the behaviour has answered by itself; or wanted to, and the caller was gone
        if isinstance(error, BrokerError):
            metadata: Mapping[str, str] | None = None
            if self._on_refusal and self._is_refusal(error):
                metadata = self._on_refusal(path, caller, error)
            if caller is not None:
                self._require_open(peer)
            details = ((DETAILS_KEY, status_details(error, metadata)),)
            await context.abort(status_code(error), error.message[:MAX_MESSAGE], details)
        reference = new_reference()
        self._on_defect(reference, path, error)
        await context.abort(grpc.StatusCode.INTERNAL, defect_message(reference))


def log_defect(reference: str, path: str, error: BaseException) -> None:
    """Write down what kind of defect happened where, without its text."""
    _LOG.error("defect %s in %s: %s", reference, path, place_of(error))


async def _asked(messages: AsyncIterator[Any], check: Callable[[], None]) -> AsyncIterator[Any]:
    """Give the messages of a stream, before each of which its caller must still be one that may call."""
    async for message in messages:
        check()
        yield message


class PrivateGrpcServer:
    """A ``grpc.aio`` server on a Unix socket in its own 0700 directory, reached only through a listener."""

    def __init__(
        self, path: Path, handlers: Sequence[grpc.GenericRpcHandler], *, ping_every: float | None = None
    ) -> None:
        """``path``'s directory is made 0700 at start, and must be for this socket alone.

        ``ping_every`` seconds: ask idle clients whether they live; for peers on a network, not for local processes.
        """
        self._path = path
        self._handlers = tuple(handlers)
        self._options = _options(ping_every)
        self._server: grpc.aio.Server | None = None

    @property
    def path(self) -> Path:
        """The socket: a listener's ``backend``."""
        return self._path

    async def start(self) -> None:
        """Bind and serve. Raises Misconfigured (``socket_path_unsafe``) when the directory is not ours alone."""
        if len(os.fsencode(self._path)) > MAX_PATH_BYTES:
            raise Misconfigured(f"{self._path} is too long for a socket", code="socket_path_unsafe")
        _private_directory(self._path.parent)
        self._path.unlink(missing_ok=True)  # of a dead server: nobody but us can put anything here
        server = grpc.aio.server(options=self._options)
        server.add_generic_rpc_handlers(self._handlers)
        try:
            server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as error:
            raise Misconfigured(f"cannot serve on {self._path}", code="socket_path_unsafe") from error
        await server.start()
        self._server = server

    async def stop(self, grace: float = 5.0) -> None:
        """Let calls in progress end for ``grace`` seconds, then cancel them; removes socket and directory."""
        if self._server is None:
            return
        await self._server.stop(grace)
        self._server = None
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._path.parent.rmdir()


def _private_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = directory.lstat()
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid():
            directory.chmod(0o700)
            return
    except OSError as error:
        raise Misconfigured(f"{directory}: {error.strerror}", code="socket_path_unsafe") from error
    raise Misconfigured(f"{directory} is not a directory of ours", code="socket_path_unsafe")


def _options(ping_every: float | None) -> list[tuple[str, int]]:
    options = [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server.max_pending_requests", MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
        ("grpc.server_handshake_timeout_ms", PREFACE_DEADLINE_MS),
        ("grpc.http2.settings_timeout", SETTINGS_DEADLINE_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
    ]
    if ping_every is not None:
        options += [("grpc.keepalive_time_ms", int(ping_every * 1000)), ("grpc.keepalive_timeout_ms", 20_000)]
        options += [("grpc.keepalive_permit_without_calls", 1)]
    return options
