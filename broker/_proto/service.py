"""gRPC services without generated service code: bindings from descriptors, server handlers and client stubs.

Knows methods, classes and streaming kinds. Knows nothing of what a service does, who may call it, or how an error is
shown: the server passes one guard for that.
"""

import asyncio
import inspect
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, Self, cast

import grpc
import grpc.aio
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from broker.errors import Invalid

# Any: a context is generic over classes that only the method's descriptor knows.
Context = grpc.aio.ServicerContext[Any, Any]
UnaryBehaviour = Callable[[Any, Context], Awaitable[Message]]
StreamBehaviour = Callable[[Any, Context], AsyncIterator[Message]]
Behaviour = UnaryBehaviour | StreamBehaviour
Guard = Callable[[str, Context], AbstractAsyncContextManager[None]]

MALFORMED = "request is not a valid message of its type"
MALFORMED_RESPONSE = "response is not a valid message of its type"
NO_REQUEST = "the request did not come"
REQUEST_DEADLINE = 10.0  # seconds for the one message of a call: it is sent together with the call's headers


class Wrap(Protocol):
    """What a server puts around every call; see :func:`guarded` for the usual way to make one."""

    def __call__(self, path: str, behaviour: Behaviour, /) -> Behaviour:
        """The behaviour to use instead.

        Given is a coroutine function, or for a streamed response an async generator function; returned is one that is
        called the same way. The request is what came off the wire; the one of a unary call is read from the context.
        """


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC: ``path`` is the HTTP/2 path, e.g. ``/SpiffeWorkloadAPI/FetchJWTSVID``."""

    name: str
    path: str
    request: type[Message]
    response: type[Message]
    streams_in: bool
    streams_out: bool

    def parse(self, raw: bytes) -> Message:
        """The request in these bytes; raises Invalid (``malformed_request``)."""
        try:
            return self.request.FromString(raw)
        except DecodeError as error:
            raise Invalid(MALFORMED, code="malformed_request") from error


@dataclass(frozen=True, slots=True)
class ServiceBinding:
    """One gRPC service: its full name, its methods by name in the order of the .proto file, and that file."""

    name: str
    methods: Mapping[str, Method] = field(repr=False, compare=False)
    file: FileDescriptor = field(repr=False, compare=False)

    @classmethod
    def of(cls, file: FileDescriptor, service: str) -> "ServiceBinding":
        """The binding of a service of one generated module: ``ServiceBinding.of(health_pb2.DESCRIPTOR, "Health")``."""
        descriptor = file.services_by_name[service]
        methods = {method.name: _method(descriptor.full_name, method) for method in descriptor.methods}
        return cls(descriptor.full_name, MappingProxyType(methods), file)


def _method(service: str, descriptor: MethodDescriptor) -> Method:
    return Method(
        name=descriptor.name,
        path=f"/{service}/{descriptor.name}",
        request=GetMessageClass(descriptor.input_type),
        response=GetMessageClass(descriptor.output_type),
        streams_in=descriptor.client_streaming,
        streams_out=descriptor.server_streaming,
    )


def service_names(bindings: Iterable[ServiceBinding]) -> tuple[str, ...]:
    """Full names of these services, sorted: what reflection and health say of one socket."""
    return tuple(sorted(binding.name for binding in bindings))


# ---- server


def handler(binding: ServiceBinding, servicer: object, wrap: Wrap) -> grpc.GenericRpcHandler:
    """Serve a binding by an object whose async methods are named as the RPCs, on a ``grpc.aio`` server.

    A method is ``async def Name(self, request, context) -> Response``, or an async generator for a streamed response;
    a streamed request is an async iterator. A method that the object lacks is UNIMPLEMENTED. What ``wrap`` gives runs
    before anything of the request is read: a caller that is refused is not waited for, and nothing of it is parsed. A
    malformed unary request is INVALID_ARGUMENT, a malformed item of a stream raises Invalid within. Raises TypeError when
    a method is of the wrong kind.
    """
    handlers = {}
    for method in binding.methods.values():
        behaviour = getattr(servicer, method.name, None)
        if behaviour is not None:
            _check_kind(method, behaviour)
            handlers[method.name] = _rpc(method, wrap(method.path, _reading(method, behaviour)))
    return grpc.method_handlers_generic_handler(binding.name, handlers)


def guarded(guard: Guard) -> Wrap:
    """A wrap from ``guard(path, context)``: entered before the behaviour, left after it, with its exception if any."""

    def wrap(path: str, behaviour: Any, /) -> Behaviour:
        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: Context) -> AsyncIterator[Message]:
                async with guard(path, context), aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response

            return stream

        async def unary(request: Any, context: Context) -> Message:
            async with guard(path, context):
                response: Message = await behaviour(request, context)
                return response
            raise AssertionError(path)  # a guard must not swallow an exception: there is no response then

        return unary

    return wrap


def _check_kind(method: Method, behaviour: Any) -> None:
    fits = inspect.isasyncgenfunction if method.streams_out else inspect.iscoroutinefunction
    if not fits(behaviour):
        wanted = "an async generator function" if method.streams_out else "a coroutine function"
        raise TypeError(f"{method.path} must be {wanted}")


def _reading(method: Method, behaviour: Any) -> Any:
    """Give a behaviour that takes what came off the wire instead, and reads it when it is its turn."""
    if method.streams_out:

        async def stream(raw: Any, context: Context, *known: Any) -> AsyncIterator[Message]:
            request = (
                _requests(method, raw) if method.streams_in else await _request(method, partial(_one, raw), context)
            )
            async with aclosing(behaviour(request, context, *known)) as responses:
                async for response in responses:
                    yield response

        return stream

    async def unary(raw: Any, context: Context, *known: Any) -> Message:
        # NOTE(speed): the context reads as grpcio's own iterator does, without the generator that this is for each call.
        request = _requests(method, raw) if method.streams_in else await _request(method, context.read, context)
        response: Message = await behaviour(request, context, *known)
        return response

    return unary


def _rpc(method: Method, behaviour: Any) -> "grpc.RpcMethodHandler[Any, Any]":
    # gRPC looks at the kind of the outermost function, so that is always one of these two, whatever wrap returned.
    # Requests arrive as bytes: a deserialiser that fails inside grpcio would be our fault to the caller, not its own.
    # They are streams to grpcio, whatever they are: it would read a single one before it calls us.
    async def unary(raw: Any, context: Context) -> Message:
        return _expect(method.response, await behaviour(raw, context))

    async def stream(raw: Any, context: Context) -> AsyncIterator[Message]:
        async with aclosing(behaviour(raw, context)) as responses:
            async for response in responses:
                yield _expect(method.response, response)

    write = method.response.SerializeToString
    if method.streams_out:
        return grpc.stream_stream_rpc_method_handler(stream, None, write)
    return grpc.stream_unary_rpc_method_handler(unary, None, write)


async def _request(method: Method, read: Callable[[], Awaitable[Any]], context: Context) -> Message:
    try:
        async with asyncio.timeout(REQUEST_DEADLINE):
            first = await read()
    except TimeoutError:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, NO_REQUEST)
    if first is grpc.aio.EOF:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_REQUEST)
    try:
        return method.parse(first)
    except Invalid as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)


async def _one(raw: AsyncIterable[bytes]) -> Any:
    # NOTE(speed): grpcio's iterator is a generator; one that is left open costs a task that closes it, for each call.
    messages = aiter(raw)
    try:
        return await anext(messages, grpc.aio.EOF)
    finally:
        await cast("AsyncGenerator[bytes, None]", messages).aclose()


async def _requests(method: Method, raw: AsyncIterator[bytes]) -> AsyncIterator[Message]:
    async for item in raw:
        yield method.parse(item)


# ---- client


class Stub:
    """A client of one binding: ``await Stub(channel, WORKLOAD).FetchJWTSVID(request, timeout=5)``.

    Each RPC is an attribute: called with a request, or an iterator of them where they are streamed, and grpcio's named
    options; it returns what grpcio returns for this channel, ``grpc.aio`` or blocking. Its type is Any: annotate the
    response (``response: JWTSVIDResponse = await …``). An unknown name raises AttributeError, a request of another
    class TypeError; within a stream that ends the call.
    """

    def __init__(self, channel: grpc.aio.Channel | grpc.Channel, binding: ServiceBinding) -> None:
        """Make the callables; no connection is made before the first call."""
        self._service = binding.name
        self._calls = {name: _call(channel, method) for name, method in binding.methods.items()}

    def __getattr__(self, name: str) -> Any:
        """The callable of one RPC."""
        # Not self._calls: without it (a copy being made) this would call itself for ever.
        call = self.__dict__.get("_calls", {}).get(name)
        if call is None:
            raise AttributeError(f"no RPC {name!r} in service {self.__dict__.get('_service', '')!r}")
        return call


class _Call:
    """A grpc.aio call, whole, but for one thing: where grpcio gives None for a malformed response, this raises.

    What is raised is what a blocking channel raises: an RPC error with INTERNAL.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_call"], name)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._whole().__await__()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        # grpcio keeps one iterator for each call, and answers with it every time.
        return _read(await anext(aiter(self._call)))

    async def read(self) -> Any:
        return _read(await self._call.read())

    async def _whole(self) -> Any:
        return _read(await self._call)


def _read(message: Any) -> Any:
    if message is None:
        nothing = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, details=MALFORMED_RESPONSE)
    return message


def _call(channel: grpc.aio.Channel | grpc.Channel, method: Method) -> Any:
    kind = f"{'stream' if method.streams_in else 'unary'}_{'stream' if method.streams_out else 'unary'}"
    call = getattr(channel, kind)(
        method.path,
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )

    def send(*requests: Any, **options: Any) -> Any:
        made = call(*requests, **options)
        return _Call(made) if isinstance(channel, grpc.aio.Channel) else made

    # grpcio sends a message of any class, and an empty one where its serialiser raises; so the class is checked here.
    def unary(request: Message, /, **options: Any) -> Any:
        return send(_expect(method.request, request), **options)

    def stream(requests: Any = None, /, **options: Any) -> Any:
        if requests is None:  # grpc.aio alone: the caller writes by itself
            return send(**options)
        checked = _each_async if hasattr(requests, "__aiter__") else _each
        return send(checked(method.request, requests), **options)

    return stream if method.streams_in else unary


def _expect(expected: type[Message], message: Message) -> Message:
    if not isinstance(message, expected):
        raise TypeError(f"expected {expected.DESCRIPTOR.full_name}, not {type(message).__name__}")
    return message


def _each(expected: type[Message], messages: Iterable[Message]) -> Iterator[Message]:
    for message in messages:
        yield _expect(expected, message)


async def _each_async(expected: type[Message], messages: AsyncIterable[Message]) -> AsyncIterator[Message]:
    async for message in messages:
        yield _expect(expected, message)
