"""SPIFFE_Workload_Endpoint.md, line by line, at the socket of a running agent and in our own client."""

import socket
import stat
from pathlib import Path

import grpc
import pytest

from broker._proto.grpc.reflection.v1 import reflection_pb2
from broker._proto.service import ServiceBinding, Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import ACTIONS, FEED, HEALTH, TASKS, WORKLOAD
from broker.agent.settings import AgentSettings
from broker.errors import Invalid, Misconfigured
from broker.sdk import Workload
from broker.sdk.endpoint import socket_target
from tests.conformance.house import HEADER, ONE, SECONDS, TWO, House, reason
from tests.fakes.running_agent import estate
from tests.fakes.workload_api import FakeWorkloadApi

REQUESTS = {
    "FetchX509SVID": workload_pb2.X509SVIDRequest(),
    "FetchX509Bundles": workload_pb2.X509BundlesRequest(),
    "FetchJWTSVID": workload_pb2.JWTSVIDRequest(audience=["tests"]),
    "FetchJWTBundles": workload_pb2.JWTBundlesRequest(),
    "ValidateJWTSVID": workload_pb2.ValidateJWTSVIDRequest(audience="tests", svid="x"),
}


def outcome(channel: grpc.Channel, path: str, request: bytes = b"", metadata: object = HEADER) -> tuple[str, str]:
    """Call any method by its path, as bytes; give the status and the words."""
    call = channel.unary_stream(path, request_serializer=bytes, response_deserializer=bytes)
    try:
        stream = call(request, metadata=metadata, timeout=SECONDS)
        next(stream, None)
        stream.cancel()
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


@pytest.mark.bears("WE-01")
def test_the_endpoint_is_of_one_host(house: House) -> None:
    facts = house.agent_socket.stat()
    assert stat.S_ISSOCK(facts.st_mode)
    assert stat.S_IMODE(facts.st_mode) == 0o777
    # There is no setting by which it could listen anywhere else.
    listening = {name for name in AgentSettings.model_fields if "bind" in name or "listen" in name}
    assert listening == set()


@pytest.mark.bears("WE-02")
def test_grpc_over_a_unix_socket_and_never_over_tcp(house: House) -> None:
    with house.channel(house.agent_socket) as channel:
        grpc.channel_ready_future(channel).result(timeout=SECONDS)
    for address in ("tcp://127.0.0.1:8081", "tcp://192.0.2.1:1", "127.0.0.1:8081", "dns:///localhost:1"):
        with pytest.raises(Misconfigured):
            socket_target(address)


@pytest.mark.bears("WE-03")
@pytest.mark.parametrize("name", REQUESTS)
def test_the_security_header(house: House, name: str) -> None:
    key, path = HEADER[0][0], WORKLOAD.methods[name].path
    wrong = [
        (), ((key, "True"),), ((key, "false"),), ((key, ""),), ((key, "true, true"),), ((key, "true"), (key, "true")),
        ((key, "true"), (key, "false")), ((key, "1"),), ((f"{key}-bin", b"true"),), (("workload-spiffe-io", "true"),),
    ]  # fmt: skip
    with house.channel(house.agent_socket) as channel:
        for metadata in wrong:
            told = outcome(channel, path, REQUESTS[name].SerializeToString(), metadata)
            assert told == ("INVALID_ARGUMENT", "security header missing from request"), metadata
        assert outcome(channel, path, REQUESTS[name].SerializeToString())[1] != "security header missing from request"


@pytest.mark.bears("WE-03")
@pytest.mark.parametrize("binding", [TASKS, ACTIONS, FEED], ids=lambda binding: binding.name)
def test_our_own_services_want_it_too(house: House, binding: ServiceBinding) -> None:
    with house.channel(house.agent_socket) as channel:
        for method in binding.methods.values():
            assert outcome(channel, method.path, metadata=())[0] == "INVALID_ARGUMENT"


@pytest.mark.bears("WE-03")
async def test_our_client_does_not_try_again_what_was_invalid(tmp_path: Path) -> None:
    async with FakeWorkloadApi(tmp_path / "s") as fake:
        fake.end(grpc.StatusCode.INVALID_ARGUMENT)
        async with Workload.connect(fake.address) as me:
            with pytest.raises(Invalid):
                await me.identity(timeout=SECONDS)
            with pytest.raises(Invalid):
                await me.identity(timeout=1)
        assert fake.opened["FetchX509SVID"] == 1


@pytest.mark.bears("WE-04")
def test_tls_is_not_spoken(house: House) -> None:
    assert house.x509().svids  # over a channel without it
    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(SECONDS)
        plain.connect(str(house.agent_socket))
        plain.sendall(b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(160))
        said = b""
        while piece := plain.recv(4096):
            said += piece
    assert b"\x16\x03" not in said[:5]


@pytest.mark.bears("WE-05")
async def test_the_variable_names_the_endpoint(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
    with pytest.raises(Misconfigured):
        Workload.connect()
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", f"unix://{house.agent_socket}")
    async with Workload.connect() as me:
        assert str((await me.identity()).id) == ONE
    # What is configured goes before the variable.
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///nowhere")
    async with Workload.connect(f"unix://{house.agent_socket}") as me:
        assert str((await me.identity()).id) == ONE


@pytest.mark.bears("WE-06")
@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("unix:///run/a.sock", "unix:/run/a.sock"),
        ("unix:/run/a.sock", "unix:/run/a.sock"),
        ("unix://run/a.sock", None),
        ("unix:run/a.sock", None),
        ("unix://user@/run/a.sock", None),
        ("unix:///run/a.sock?x=1", None),
        ("unix:///run/a.sock#x", None),
        ("unix://", None),
        ("tcp://127.0.0.1:8000/foo", None),
        ("tcp://localhost:8000", None),
        ("http://127.0.0.1:8000", None),
    ],
)
def test_addresses(address: str, target: str | None) -> None:
    if target is not None:
        assert socket_target(address) == target
        return
    with pytest.raises(Misconfigured):
        socket_target(address)


@pytest.mark.bears("WE-07")
def test_the_kernel_says_who_calls_and_the_caller_says_nothing(house: House) -> None:
    claims = (("x-spiffe-id", TWO), ("x-peer-pid", "1"), ("x-peer-uid", "0"), ("forwarded", "for=unix"))
    with house.workload() as stub:
        call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=(*HEADER, *claims), timeout=SECONDS)
        assert [one.spiffe_id for one in next(call).svids] == [ONE, TWO]
        call.cancel()
    assert set(house.refusals.values()) == {("PERMISSION_DENIED", "no identity issued")}


@pytest.mark.bears("WE-08")
async def test_before_it_knows_anything_it_says_try_again() -> None:
    async with estate(synced=False, server_port=1) as agent, agent.workload() as stub:
        for name, request in REQUESTS.items():
            if name == "ValidateJWTSVID":
                continue
            call = getattr(stub, name)(request, metadata=HEADER, timeout=SECONDS)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await (call.read() if WORKLOAD.methods[name].streams_out else call)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, name


@pytest.mark.bears("WE-09")
def test_without_an_entry_there_is_no_identity(house: House) -> None:
    assert house.refusals["FetchX509SVID"] == ("PERMISSION_DENIED", "no identity issued")
    # It may try again: an entry that comes later is served.
    with house.registered("/conformance/strange", selectors=[f"unix:path:{house.stranger}"]):
        assert house.strange()["FetchX509SVID"] == ("OK", "")


@pytest.mark.bears("WE-10")
def test_what_is_not_implemented_says_so(house: House) -> None:
    with house.channel(house.agent_socket) as channel:
        for path in ("/SpiffeWorkloadAPI/FetchEverything", "/spiffe.workload.SpiffeWorkloadAPI/FetchX509SVID", "/x/y"):
            assert outcome(channel, path)[0] == "UNIMPLEMENTED"


@pytest.mark.bears("WE-10")
async def test_our_client_reports_it_and_does_not_try_again(tmp_path: Path) -> None:
    async with FakeWorkloadApi(tmp_path / "s") as fake:
        fake.end(grpc.StatusCode.UNIMPLEMENTED)
        async with Workload.connect(fake.address) as me:
            with pytest.raises(Invalid, match="does not serve"):
                await me.identity(timeout=SECONDS)
            with pytest.raises(Invalid, match="does not serve"):
                await me.identity(timeout=1)
        assert fake.opened["FetchX509SVID"] == 1


@pytest.mark.bears("WE-11")
def test_what_is_ours_has_services_of_its_own(house: House) -> None:
    assert (TASKS.name, FEED.name) == ("broker.agent.v1.Tasks", "broker.agent.v1.Feed")
    with house.channel(house.agent_socket) as channel:
        # The Broker API of the SPIFFE standard is incubating and off.
        for method in ("SubscribeToX509SVID", "SubscribeToX509Bundles", "FetchJWTSVID", "SubscribeToJWTBundles"):
            assert outcome(channel, f"/spiffe.broker.API/{method}")[0] == "UNIMPLEMENTED"
        assert outcome(channel, f"/{HEALTH.name}/Check", metadata=()) == ("OK", "")


@pytest.mark.bears("WE-12")
def test_the_workload_api_is_there(house: House) -> None:
    with house.channel(house.agent_socket) as channel:
        for name, request in REQUESTS.items():
            code = outcome(channel, WORKLOAD.methods[name].path, request.SerializeToString())[0]
            assert code == ("INVALID_ARGUMENT" if name == "ValidateJWTSVID" else "OK"), name


@pytest.mark.bears("WE-13")
def test_reflection(house: House) -> None:
    binding = ServiceBinding.of(reflection_pb2.DESCRIPTOR, "ServerReflection")
    with house.channel(house.agent_socket) as channel:
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = Stub(channel, binding).ServerReflectionInfo(iter([asked]), timeout=SECONDS)
        names = {one.name for one in next(answers).list_services_response.service}
    assert {WORKLOAD.name, TASKS.name, FEED.name, HEALTH.name} <= names
    assert not any("admin" in name.lower() or "debug" in name.lower() for name in names)


def test_the_words_are_those_of_a_refusal(house: House) -> None:
    with house.workload() as stub:
        call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), timeout=SECONDS)
        assert reason(lambda: next(call)) == "security_header_missing"
