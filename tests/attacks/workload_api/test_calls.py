"""What is answered, and with which status: headers, spoofed metadata, statuses, streams, hints, malformed messages, reflection."""

import os
import time
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.grpc.reflection.v1 import reflection_pb2
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import ACTIONS, ADMIN, FEED, HEALTH, TASKS, WORKLOAD
from tests.attacks.workload_api.frames import SECURITY, Connection, data_frames, message
from tests.attacks.workload_api.rig import JWT, MIB, SCALE, SERVICE, Rig, rig
from tests.fakes.fake_server import FakeCa, entry_message

ME = f"unix:uid:{os.geteuid()}"
X509 = SERVICE + "FetchX509SVID"
NAME = "workload.spiffe.io"
REQUESTS = {
    "FetchX509SVID": b"",
    "FetchX509Bundles": b"",
    "FetchJWTSVID": JWT,
    "FetchJWTBundles": b"",
    "ValidateJWTSVID": workload_pb2.ValidateJWTSVIDRequest(audience="a", svid="b").SerializeToString(),
    "FetchWITSVID": b"",
    "FetchWITBundles": b"",
}
HEADERS = {
    "absent": (),
    "True": ((NAME, "True"),),
    "false": ((NAME, "false"),),
    "empty": ((NAME, ""),),
    "twice": ((NAME, "true"), (NAME, "true")),
    "true and false": ((NAME, "true"), (NAME, "false")),
    "a list": ((NAME, "true, true"),),
    "a list without space": ((NAME, "true,true"),),
    "leading space": ((NAME, " true"),),
    "trailing tab": ((NAME, "true\t"),),
    "one": ((NAME, "1"),),
    "binary": ((f"{NAME}-bin", "dHJ1ZQ"),),
    "another name": ((f"x-{NAME}", "true"),),
}


@pytest.fixture(scope="module")
def talkative() -> Iterator[Rig]:
    """Its log says who was attested."""
    with rig(log_level="debug") as one:
        yield one
        assert "Traceback" not in one.said()


@pytest.mark.bears("WA-02", "WE-11")
def test_the_standards_methods_are_all_there_and_ours_are_services_of_their_own() -> None:
    assert set(REQUESTS) == set(WORKLOAD.methods)
    assert {TASKS.name, ACTIONS.name, FEED.name} == {f"broker.agent.v1.{name}" for name in ("Tasks", "Actions", "Feed")}


@pytest.mark.bears("W01", "WE-03")
@pytest.mark.parametrize("header", HEADERS)
def test_without_the_header_every_method_is_invalid_and_nobody_is_attested(talkative: Rig, header: str) -> None:
    with Connection(talkative.socket) as one:
        for method, request in REQUESTS.items():
            heard = one.call(SERVICE + method, request, HEADERS[header])
            assert heard.status in {3, "reset 1"}, method  # RFC 9113 forbids some of these values to be sent at all
            if heard.status == 3:
                assert "security%20header%20missing" in heard.headers["grpc-message"].replace(" ", "%20")
            assert not heard.messages
            if one.closed:
                break
        for binding in (TASKS, ACTIONS, FEED):
            for method in binding.methods.values():
                assert one.call(method.path, b"", HEADERS[header]).status in {3, "reset 1"}, method
        assert one.call("/grpc.health.v1.Health/Check", metadata=HEADERS[header]).status == 0
    assert "workload_attested" not in talkative.said()


@pytest.mark.bears("W01")
def test_with_the_header_the_same_caller_is_attested(talkative: Rig) -> None:
    """The control of the test before, in any case of the name's spelling that HTTP/2 allows: one."""
    with Connection(talkative.socket) as one:
        assert one.call(SERVICE + "FetchJWTSVID", JWT).status == 0
    assert "workload_attested" in talkative.said()


@pytest.mark.bears("W02", "WE-07")
def test_what_a_caller_writes_about_itself_has_no_effect(agent: Rig) -> None:
    agent.server.do(lambda fake: fake.put(entry_message("other", "/wl/other", ["unix:uid:4294967"])))
    spoofed = (
        ("x-peer-pid", "1"),
        ("x-peer-uid", "4294967"),
        ("x-spiffe-id", "spiffe://example.org/wl/other"),
        ("forwarded", "for=unix"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-client-cert", "URI=spiffe://example.org/wl/other"),
        ("grpc-peer", "unix-abstract:" + "0" * 32),
        (":authority-x", "other"),
    )
    with Connection(agent.socket) as one:
        for metadata in ((*SECURITY, *spoofed[:-1]), SECURITY):
            stream = one.open(X509, b"", metadata)
            (first,) = one.first(stream)
            assert [svid.spiffe_id for svid in workload_pb2.X509SVIDResponse.FromString(first).svids] == [
                "spiffe://example.org/wl/me"
            ]
    agent.server.do(lambda fake: fake.remove("other"))


@pytest.mark.bears("W03", "WE-09", "WE-10", "WA-09", "WA-14", "WA-17", "WA-23")
def test_statuses(agent: Rig) -> None:
    unauthorized = workload_pb2.JWTSVIDRequest(audience=["a"], spiffe_id="spiffe://example.org/no")
    cases = [
        ("FetchJWTSVID", b"", 3),
        ("FetchJWTSVID", workload_pb2.JWTSVIDRequest(audience=[""]).SerializeToString(), 3),
        ("FetchJWTSVID", workload_pb2.JWTSVIDRequest(audience=["a"], spiffe_id="no").SerializeToString(), 3),
        ("FetchJWTSVID", unauthorized.SerializeToString(), 7),
        ("ValidateJWTSVID", b"", 3),
        ("ValidateJWTSVID", workload_pb2.ValidateJWTSVIDRequest(audience="a").SerializeToString(), 3),
        ("ValidateJWTSVID", REQUESTS["ValidateJWTSVID"], 3),
        ("FetchWITSVID", b"", 12),
        ("FetchWITBundles", b"", 12),
        ("Unknown", b"", 12),
    ]
    with Connection(agent.socket) as one:
        for method, request, status in cases:
            assert one.call(SERVICE + method, request).status == status, (method, request)
        assert one.call("/no.such.Service/Method").status == 12
        for method in ADMIN.methods.values():
            assert one.call(method.path).status == 12


@pytest.mark.bears("W03", "WE-09")
def test_nobody_without_an_entry_has_an_identity() -> None:
    with (
        rig(entries=(entry_message("e1", "/wl/x", ["unix:uid:4294967"]),)) as one,
        Connection(one.socket) as caller,
    ):
        for method in ("FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles", "FetchJWTSVID"):
            heard = caller.call(SERVICE + method, REQUESTS[method])
            assert (heard.status, heard.headers["grpc-message"]) == (7, "no identity issued")


@pytest.mark.bears("W03", "WE-08")
def test_before_the_first_sync_it_says_try_again() -> None:
    with rig(ready=False, server_port=1) as one, Connection(one.socket) as caller:
        for method in ("FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles", "FetchJWTSVID"):
            assert caller.call(SERVICE + method, REQUESTS[method]).status == 14
        checked = caller.call("/grpc.health.v1.Health/Check", metadata=())
        assert health_pb2.HealthCheckResponse.FromString(checked.messages[0]).status == 2


def ids(raw: bytes) -> list[str]:
    return [one.spiffe_id.rpartition("/")[2] for one in workload_pb2.X509SVIDResponse.FromString(raw).svids]


@pytest.mark.bears("W04", "WA-04", "WA-05", "WA-06", "WA-08", "WA-15")
def test_a_stream_has_the_full_set_at_once_and_after_each_change_and_ends_with_the_last(agent: Rig) -> None:
    do = agent.server.do
    with Connection(agent.socket) as one:
        began = time.monotonic()
        svids = one.open(X509)
        assert [ids(each) for each in one.first(svids)] == [["me"]]
        assert time.monotonic() - began < 20
        bundles, jwks = one.open(SERVICE + "FetchX509Bundles"), one.open(SERVICE + "FetchJWTBundles")
        one.first(bundles), one.first(jwks)
        do(lambda fake: fake.put(entry_message("e2", "/wl/two", [ME], created_at=2_000_000_000)))
        assert ids(one.first(svids, 2)[1]) == ["me", "two"]
        do(lambda fake: fake.remove("e1"))
        assert ids(one.first(svids, 3)[2]) == ["two"]
        ca = FakeCa()
        began = time.monotonic()
        do(lambda fake: fake.push_bundles(fake.ca.message((ca,))))
        for stream, count in ((svids, 4), (bundles, 2), (jwks, 2)):
            assert len(one.first(stream, count)) == count
        assert time.monotonic() - began < 20
        do(lambda fake: fake.remove("e2"))
        for stream in (svids, bundles, jwks):
            assert one.finish(stream).status == 7
        assert len(one.streams[svids].messages) == 4
    do(lambda fake: fake.push_bundles(fake.ca.message()))
    do(lambda fake: fake.put(entry_message("e1", "/wl/me", [ME])))


@pytest.mark.bears("W04")
def test_nothing_is_pushed_while_nothing_changes(agent: Rig) -> None:
    with Connection(agent.socket) as one:
        streams = [one.open(SERVICE + name) for name in ("FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles")]
        for stream in streams:
            one.first(stream)
        # What is others', and what is said again, is no change.
        agent.server.do(lambda fake: fake.put(entry_message("e9", "/wl/nine", ["unix:uid:4294967"])))
        agent.server.do(lambda fake: fake.push_bundles(fake.ca.message()))
        assert not one.until(lambda: any(len(one.streams[each].messages) > 1 for each in streams), 10 * SCALE)
        assert [one.streams[each].status for each in streams] == [None] * 3
        agent.server.do(lambda fake: fake.remove("e9"))


@pytest.mark.bears("W05", "WA-13")
def test_a_hint_is_the_oldest_entrys_alone(agent: Rig) -> None:
    entries = [
        entry_message("h3", "/wl/newest", [ME], hint="db", created_at=2_000_000_003),
        entry_message("h1", "/wl/oldest", [ME], hint="db", created_at=2_000_000_001),
        entry_message("h2", "/wl/middle", [ME], hint="db", created_at=2_000_000_002),
        entry_message("h4", "/wl/plain", [ME], created_at=2_000_000_004),
    ]
    for entry in entries:
        agent.server.do(lambda fake, entry=entry: fake.put(entry))
    wanted = [("me", ""), ("oldest", "db"), ("plain", "")]
    with Connection(agent.socket) as one:
        stream = one.open(X509)

        def last() -> list[tuple[str, str]]:
            answers = one.streams[stream].messages
            svids = workload_pb2.X509SVIDResponse.FromString(answers[-1]).svids if answers else []
            return [(svid.spiffe_id.rpartition("/")[2], svid.hint) for svid in svids]

        assert one.until(lambda: last() == wanted), last()
        answer = workload_pb2.JWTSVIDResponse.FromString(one.call(SERVICE + "FetchJWTSVID", JWT).messages[0])
        assert [(svid.spiffe_id.rpartition("/")[2], svid.hint) for svid in answer.svids] == wanted
        agent.server.do(lambda fake: fake.remove("h1"))
        assert one.until(lambda: last() == [("me", ""), ("middle", "db"), ("plain", "")]), last()
    for name in ("h2", "h3", "h4"):
        agent.server.do(lambda fake, name=name: fake.remove(name))


def tag(number: int, kind: int) -> bytes:
    return bytes((number << 3 | kind,))


def string(number: int, value: bytes) -> bytes:
    size, out = len(value), b""
    while size >= 128:
        out, size = out + bytes((size % 128 | 128,)), size // 128
    return tag(number, 2) + out + bytes((size,)) + value


MALFORMED = {
    "a wire type that does not exist": b"\x0f",
    "an end without a group": tag(15, 4),
    "groups 10,000 deep": tag(15, 3) * 10_000,
    "groups 10,000 deep, closed": tag(15, 3) * 10_000 + tag(15, 4) * 10_000,
    "a field number of zero": b"\x00\x01",
    "invalid UTF-8": string(1, b"\xff\xfe"),
    "a surrogate in UTF-8": string(1, b"\xed\xa0\x80"),
    "cut short": JWT[:-1],
    "a length beyond the end": tag(1, 2) + b"\xff\xff\xff\xff\x0f" + b"a",
    "an endless varint": tag(15, 0) + b"\xff" * 11,
    "a million audiences": string(1, b"a") * 1_000_000,
    "a million empty audiences": string(1, b"") * 1_000_000,
    "65 audiences": b"".join(string(1, str(number).encode()) for number in range(65)),
    "an audience of 1 MiB": string(1, b"a" * MIB),
}


@pytest.mark.bears("W13")
@pytest.mark.parametrize("case", MALFORMED)
def test_a_message_that_is_none_is_the_callers_fault(agent: Rig, case: str) -> None:
    before = agent.facts().rss
    with Connection(agent.socket) as one:
        for method in ("FetchJWTSVID", "ValidateJWTSVID"):
            stream = one.open(SERVICE + method, None, end=False)
            one.upload(stream, message(MALFORMED[case]))
            assert one.finish(stream).status == 3, method
        assert one.call(SERVICE + "FetchJWTSVID", JWT).status == 0
    assert agent.facts().rss - before < 64 * MIB


@pytest.mark.bears("W13")
def test_what_a_message_may_also_hold_is_overlooked(agent: Rig) -> None:
    unknown = string(15, b"x") + tag(14, 0) + b"\xff" * 9 + b"\x01" + tag(13, 3) + tag(13, 4)
    negative = tasks_pb2.StartTaskRequest(ttl=-1).SerializeToString()  # a field that no other request has
    with Connection(agent.socket) as one:
        assert one.call(SERVICE + "FetchJWTSVID", JWT + unknown).status == 0
        for method in (*TASKS.methods.values(), *FEED.methods.values()):
            # No task was named: refused for what it asks, whatever else it says; never a defect of ours.
            assert one.call(method.path, negative + unknown, seconds=3).status != 13, method


@pytest.mark.bears("W13")
@settings(max_examples=int(500 * SCALE), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*REQUESTS, "TASKS", "FEED"]), st.binary(max_size=200), st.booleans())
def test_no_bytes_at_all_are_a_defect(agent: Rig, method: str, raw: bytes, after: bool) -> None:
    path = SERVICE + method
    if method == "TASKS":
        path = next(iter(TASKS.methods.values())).path
    elif method == "FEED":
        path = next(iter(FEED.methods.values())).path
    with Connection(agent.socket) as one:
        stream = one.open(path, None, end=False)
        one.send(data_frames(stream, message(JWT + raw if after else raw), end=True))
        heard = one.streams[stream]
        one.until(lambda: heard.status is not None or heard.messages, 10)
        assert heard.messages or heard.status in {0, 3, 5, 7, 12}, heard


@pytest.mark.bears("W14", "WE-12", "WE-13")
@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_needs_no_header_and_knows_the_public_services_alone(agent: Rig, version: str) -> None:
    path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services="*"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="SpiffeWorkloadAPI"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=ADMIN.name),
        reflection_pb2.ServerReflectionRequest(file_by_filename="broker/agent/v1/admin.proto"),
    ]
    with Connection(agent.socket) as one:
        stream = one.open(path, None, (), end=False)
        one.send(data_frames(stream, b"".join(message(each.SerializeToString()) for each in asked), end=True))
        assert one.finish(stream).status == 0
        answers = [reflection_pb2.ServerReflectionResponse.FromString(each) for each in one.streams[stream].messages]
    listed = {service.name for service in answers[0].list_services_response.service}
    assert listed == {
        *(binding.name for binding in (WORKLOAD, TASKS, ACTIONS, FEED, HEALTH)),
        "envoy.service.secret.v3.SecretDiscoveryService",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    files = answers[1].file_descriptor_response.file_descriptor_proto
    assert any(one.name == "SpiffeWorkloadAPI" for one in FileDescriptorProto.FromString(files[0]).service)
    assert [each.error_response.error_code for each in answers[2:]] == [5, 5]


@pytest.mark.bears("W14")
def test_health_knows_what_is_served_and_needs_no_header(agent: Rig) -> None:
    with Connection(agent.socket) as one:
        for name, status in (("", 0), (WORKLOAD.name, 0), (TASKS.name, 0), (FEED.name, 0), (ADMIN.name, 5), ("x", 5)):
            request = health_pb2.HealthCheckRequest(service=name).SerializeToString()
            assert one.call("/grpc.health.v1.Health/Check", request, ()).status == status, name
