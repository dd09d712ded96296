"""Bindings, handlers and stubs over real grpc.aio servers on Unix sockets."""

import asyncio
import copy
import shutil
import tempfile
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.pool import load
from broker._proto.service import ServiceBinding, Stub, guarded, handler, service_names
from broker._proto.spiffe import workload_pb2
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker.errors import BrokerError, Invalid, PolicyDenied

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # py-spiffe's generated code is one major version older than the runtime
    from spiffe._proto import workload_pb2 as theirs_pb2

# One service with all four kinds; the product has no call with a streamed request and a single response.
FILE = FileDescriptorProto(name="tests/echo.proto", package="tests.echo", syntax="proto3")
FILE.message_type.add(name="Text").field.add(name="text", number=1, type=9, label=1)
ECHO_SERVICE = FILE.service.add(name="Echo")
for rpc, streams_in, streams_out in (("Say", 0, 0), ("Split", 0, 1), ("Join", 1, 0), ("Talk", 1, 1), ("Absent", 0, 0)):
    ECHO_SERVICE.method.add(
        name=rpc,
        input_type=".tests.echo.Text",
        output_type=".tests.echo.Text",
        client_streaming=bool(streams_in),
        server_streaming=bool(streams_out),
    )
MODULE = {"__name__": __name__}
ECHO = ServiceBinding.of(load(FILE.SerializeToString(), MODULE), "Echo")
Text = MODULE["Text"]
WORKLOAD = ServiceBinding.of(workload_pb2.DESCRIPTOR, "SpiffeWorkloadAPI")
HEALTH = ServiceBinding.of(health_pb2.DESCRIPTOR, "Health")


class Echo:
    """The service under test; ``closed`` is set when an endless stream was ended."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def Say(self, request, context):
        if request.text == "deny":
            raise PolicyDenied("not you")
        return Text(text=request.text.upper())

    async def Split(self, request, context):
        try:
            for word in request.text.split():
                if word == "deny":
                    raise PolicyDenied("not that word")
                yield Text(text=word)
            if request.text.endswith(" "):
                await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def Join(self, request, context):
        return Text(text=" ".join([item.text async for item in request]))

    async def Talk(self, request, context):
        async for item in request:
            yield Text(text=f"{item.text}?")


class Guard:
    """Counts calls and maps errors; what a real server does, in small."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.left: list[str] = []

    @asynccontextmanager
    async def __call__(self, path, context):
        self.seen.append(path)
        try:
            if ("refuse", "1") in context.invocation_metadata():
                raise PolicyDenied("at the door")
            yield
        except Invalid as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.reason)
        except BrokerError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, error.message)
        finally:
            self.left.append(path)


@pytest.fixture
def socket() -> Iterator[str]:
    folder = tempfile.mkdtemp(dir="/tmp")
    yield f"unix:{Path(folder, 's')}"
    shutil.rmtree(folder)


@asynccontextmanager
async def serving(socket: str, *handlers: grpc.GenericRpcHandler) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(handlers)
    server.add_insecure_port(socket)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(socket) as channel:
            yield channel
    finally:
        await server.stop(None)


async def talk(*words: str):
    for word in words:
        yield Text(text=word)


@pytest.fixture
def guard() -> Guard:
    return Guard()


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def channel(socket: str, guard: Guard, echo: Echo) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(socket, handler(ECHO, echo, guarded(guard))) as channel:
        yield channel


def test_binding_has_paths_classes_and_kinds() -> None:
    method = WORKLOAD.methods["FetchX509SVID"]
    assert method.path == "/SpiffeWorkloadAPI/FetchX509SVID"
    assert method.request is workload_pb2.X509SVIDRequest
    assert method.response is workload_pb2.X509SVIDResponse
    assert (method.streams_in, method.streams_out) == (False, True)
    attest = ServiceBinding.of(agent_pb2.DESCRIPTOR, "Agent").methods["AttestAgent"]
    assert attest.path == "/spire.api.server.agent.v1.Agent/AttestAgent"
    assert (attest.streams_in, attest.streams_out) == (True, True)


def test_service_names_are_full_and_sorted() -> None:
    assert service_names([HEALTH, WORKLOAD]) == ("SpiffeWorkloadAPI", "grpc.health.v1.Health")


async def test_each_kind_makes_its_round_trip_through_the_guard(channel: grpc.aio.Channel, guard: Guard) -> None:
    stub = Stub(channel, ECHO)
    assert (await stub.Say(Text(text="hi"))).text == "HI"
    assert [item.text async for item in stub.Split(Text(text="a b c"))] == ["a", "b", "c"]
    assert (await stub.Join(talk("x", "y"))).text == "x y"
    assert [item.text async for item in stub.Talk(talk("1", "2"))] == ["1?", "2?"]
    assert guard.seen == [f"/tests.echo.Echo/{name}" for name in ("Say", "Split", "Join", "Talk")]
    assert guard.left == guard.seen


async def test_the_guard_refuses_and_maps_errors_of_every_kind(channel: grpc.aio.Channel) -> None:
    stub = Stub(channel, ECHO)

    async def drained(call) -> list[str]:
        return [item.text async for item in call]

    refused = {"metadata": (("refuse", "1"),)}
    for attempt in (
        stub.Say(Text(text="a"), **refused),
        drained(stub.Split(Text(text="a"), **refused)),
        stub.Join(talk("a"), **refused),
        drained(stub.Talk(talk("a"), **refused)),
        stub.Say(Text(text="deny")),
        drained(stub.Split(Text(text="a deny b"))),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await attempt
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_client_that_goes_away_ends_the_stream_and_the_guard(
    channel: grpc.aio.Channel, echo: Echo, guard: Guard
) -> None:
    call = Stub(channel, ECHO).Split(Text(text="one "))
    assert (await call.read()).text == "one"
    call.cancel()
    async with asyncio.timeout(30):
        await echo.closed.wait()
        while not guard.left:
            await asyncio.sleep(0)


@pytest.mark.bears("WE-10")
async def test_a_method_without_code_and_an_unknown_service_are_unimplemented(channel: grpc.aio.Channel) -> None:
    for attempt in (
        Stub(channel, ECHO).Absent(Text()),
        Stub(channel, WORKLOAD).FetchJWTSVID(workload_pb2.JWTSVIDRequest()),
        channel.unary_unary("/tests.echo.Echo/Nothing")(b""),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await attempt
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_bytes_that_are_no_message_are_the_callers_fault(channel: grpc.aio.Channel, guard: Guard) -> None:
    async def garbage():
        yield b"\xff"

    for attempt in (
        channel.unary_unary("/tests.echo.Echo/Say")(b"\xff"),
        channel.unary_stream("/tests.echo.Echo/Split")(b"\xff").read(),
        channel.stream_unary("/tests.echo.Echo/Join")(garbage()),
        channel.stream_stream("/tests.echo.Echo/Talk")(garbage()).read(),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await attempt
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(guard.seen) == 4  # nothing of a request is read before the guard


async def test_a_blocking_channel_uses_the_same_stub(channel: grpc.aio.Channel, socket: str) -> None:
    def calls() -> list[str]:
        with grpc.insecure_channel(socket) as blocking:
            stub = Stub(blocking, ECHO)
            said = stub.Say(Text(text="hi"), timeout=30).text
            split = [item.text for item in stub.Split(Text(text="a b"), timeout=30)]
            joined = stub.Join(iter([Text(text="c"), Text(text="d")]), timeout=30).text
            return [said, *split, joined]

    assert await asyncio.to_thread(calls) == ["HI", "a", "b", "c d"]


async def test_py_spiffes_classes_speak_to_our_handler(socket: str) -> None:
    class Workload:
        async def FetchJWTSVID(self, request, context):
            assert type(request) is workload_pb2.JWTSVIDRequest
            svids = [workload_pb2.JWTSVID(spiffe_id=request.spiffe_id, svid="a.b.c", hint=request.audience[0])]
            return workload_pb2.JWTSVIDResponse(svids=svids)

        async def FetchX509SVID(self, request, context):
            yield workload_pb2.X509SVIDResponse(svids=[workload_pb2.X509SVID(bundle=b"\x30")])

    async with serving(socket, handler(WORKLOAD, Workload(), lambda path, behaviour: behaviour)) as channel:
        unary = channel.unary_unary(
            "/SpiffeWorkloadAPI/FetchJWTSVID",
            request_serializer=theirs_pb2.JWTSVIDRequest.SerializeToString,
            response_deserializer=theirs_pb2.JWTSVIDResponse.FromString,
        )
        response = await unary(theirs_pb2.JWTSVIDRequest(audience=["a"], spiffe_id="spiffe://example.org/x"))
        assert [(svid.spiffe_id, svid.svid, svid.hint) for svid in response.svids] == [
            ("spiffe://example.org/x", "a.b.c", "a")
        ]
        stream = channel.unary_stream(
            "/SpiffeWorkloadAPI/FetchX509SVID",
            request_serializer=theirs_pb2.X509SVIDRequest.SerializeToString,
            response_deserializer=theirs_pb2.X509SVIDResponse.FromString,
        )
        assert [item.svids[0].bundle async for item in stream(theirs_pb2.X509SVIDRequest())] == [b"\x30"]


async def test_a_stub_refuses_unknown_names_and_other_classes(channel: grpc.aio.Channel) -> None:
    stub = Stub(channel, ECHO)
    with pytest.raises(AttributeError, match=r"no RPC 'Shout' in service 'tests\.echo\.Echo'"):
        copy.copy(stub).Shout  # noqa: B018
    with pytest.raises(TypeError, match=r"expected tests\.echo\.Text, not JWTSVIDRequest"):
        stub.Say(workload_pb2.JWTSVIDRequest())


async def test_a_request_of_another_class_in_a_stream_ends_the_call(channel: grpc.aio.Channel, socket: str) -> None:
    async def wrong():
        yield Text(text="right")
        yield workload_pb2.JWTSVIDRequest()

    with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
        await Stub(channel, ECHO).Join(wrong())

    def blocking() -> grpc.StatusCode:
        with grpc.insecure_channel(socket) as other, pytest.raises(grpc.RpcError) as caught:
            Stub(other, ECHO).Join(iter([workload_pb2.JWTSVIDRequest()]), timeout=30)
        return caught.value.code()

    assert await asyncio.to_thread(blocking) is grpc.StatusCode.UNKNOWN


async def test_a_response_of_another_class_is_never_sent(socket: str) -> None:
    class Wrong:
        async def Say(self, request, context):
            return workload_pb2.JWTSVIDResponse()

    async with serving(socket, handler(ECHO, Wrong(), lambda path, behaviour: behaviour)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Stub(channel, ECHO).Say(Text())
        assert caught.value.code() is grpc.StatusCode.UNKNOWN


async def test_bytes_that_are_no_response_are_an_rpc_error_and_never_none(socket: str) -> None:
    async def unary(request, context):
        return b"\xff"

    async def stream(request, context):
        yield b""
        yield b"\xff"

    handlers = {
        "Say": grpc.unary_unary_rpc_method_handler(unary),
        "Split": grpc.unary_stream_rpc_method_handler(stream),
    }
    async with serving(socket, grpc.method_handlers_generic_handler(ECHO.name, handlers)) as channel:
        stub = Stub(channel, ECHO)
        reader, iterated = stub.Split(Text()), stub.Split(Text())
        assert await reader.read() == Text()
        assert await anext(iterated) == Text()
        for attempt in (stub.Say(Text()), reader.read(), anext(iterated)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await attempt
            assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_a_call_keeps_all_that_grpcio_gives_it(channel: grpc.aio.Channel) -> None:
    call = Stub(channel, ECHO).Say(Text(text="a"), timeout=30)
    assert (await asyncio.wait_for(call, 30)).text == "A"
    assert await call.code() is grpc.StatusCode.OK
    assert call.done()


async def test_a_client_may_write_its_stream_itself(channel: grpc.aio.Channel) -> None:
    call = Stub(channel, ECHO).Talk()
    await call.write(Text(text="1"))
    assert (await call.read()).text == "1?"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


def test_a_method_of_the_wrong_kind_is_refused_at_once() -> None:
    class Wrong:
        def Say(self, request, context):
            return Text()

    class Swapped:
        async def Split(self, request, context):
            return Text()

    for servicer in (Wrong(), Swapped()):
        with pytest.raises(TypeError, match="must be"):
            handler(ECHO, servicer, lambda path, behaviour: behaviour)
