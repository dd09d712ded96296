"""The private pool: our messages beside py-spiffe's, well-known types with their methods, strictness of the pool."""

import datetime as dt
import subprocess
import sys
import textwrap
import warnings

import pytest
from google.protobuf import descriptor_pool, json_format
from google.protobuf import struct_pb2 as public_struct_pb2

from broker._proto.google.protobuf import any_pb2, duration_pb2, empty_pb2, struct_pb2, timestamp_pb2, wrappers_pb2
from broker._proto.google.rpc import error_details_pb2, status_pb2
from broker._proto.pool import POOL
from broker._proto.spiffe import workload_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2 as entry_service_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2
from broker._proto.spire.api.types import status_pb2 as spire_status_pb2

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # py-spiffe's generated code is one major version older than the runtime
    from spiffe._proto import workload_pb2 as theirs_pb2

IMPORTS = {
    "ours": "from broker._proto.spiffe import workload_pb2 as ours",
    "theirs": "import spiffe; from spiffe._proto import workload_pb2 as theirs",
}


@pytest.mark.parametrize("implementation", ["upb", "python"])
@pytest.mark.parametrize("order", [("ours", "theirs"), ("theirs", "ours")])
def test_lives_in_one_process_with_py_spiffe(order: tuple[str, str], implementation: str) -> None:
    program = textwrap.dedent("""
        message = ours.JWTSVIDRequest(audience=["a"], spiffe_id="spiffe://example.org/x")
        other = theirs.JWTSVIDRequest.FromString(message.SerializeToString())
        assert ours.JWTSVIDRequest.FromString(other.SerializeToString()) == message
        assert type(other) is not type(message)
    """)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join([*(IMPORTS[name] for name in order), program])],
        env={"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_nothing_of_ours_is_in_the_default_pool() -> None:
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("spire.api.types.Entry")
    assert POOL.FindMessageTypeByName("spire.api.types.Entry") is entry_pb2.Entry.DESCRIPTOR


@pytest.mark.parametrize("name", sorted(theirs_pb2.DESCRIPTOR.message_types_by_name))
def test_every_message_of_py_spiffe_has_our_fields(name: str) -> None:
    def fields(module):
        message = module.DESCRIPTOR.message_types_by_name[name]
        return {
            (field.name, field.number, field.type, field.is_repeated, field.message_type and field.message_type.name)
            for field in message.fields
        }

    assert fields(workload_pb2) == fields(theirs_pb2)


def test_bytes_are_interchangeable_with_py_spiffe() -> None:
    ours = workload_pb2.X509SVIDResponse(
        svids=[workload_pb2.X509SVID(spiffe_id="spiffe://example.org/a", x509_svid=b"\x30", hint="internal")],
        crl=[b"\x01"],
        federated_bundles={"spiffe://other.org": b"\x30\x82"},
    )
    theirs = theirs_pb2.X509SVIDResponse.FromString(ours.SerializeToString())
    assert theirs.svids[0].hint == "internal"
    assert dict(theirs.federated_bundles) == {"spiffe://other.org": b"\x30\x82"}
    assert workload_pb2.X509SVIDResponse.FromString(theirs.SerializeToString()) == ours


def test_struct_is_our_class_with_its_usual_methods() -> None:
    response = workload_pb2.ValidateJWTSVIDResponse(spiffe_id="spiffe://example.org/a")
    response.claims.update({"aud": ["x", "y"], "exp": 7, "cnf": {"jkt": None}})
    assert type(response.claims) is struct_pb2.Struct
    theirs = theirs_pb2.ValidateJWTSVIDResponse.FromString(response.SerializeToString())
    assert json_format.MessageToDict(theirs.claims) == {"aud": ["x", "y"], "exp": 7, "cnf": {"jkt": None}}
    copy = struct_pb2.Struct()
    copy.CopyFrom(response.claims)
    assert copy["exp"] == 7


def test_a_struct_of_the_public_pool_is_refused() -> None:
    response = workload_pb2.ValidateJWTSVIDResponse()
    with pytest.raises(TypeError):
        response.claims.CopyFrom(public_struct_pb2.Struct())


def test_any_packs_and_unpacks_our_messages() -> None:
    info = error_details_pb2.ErrorInfo(reason="NO_IDENTITY", domain="broker", metadata={"hint": "register"})
    denied = spire_status_pb2.PermissionDeniedDetails(reason=spire_status_pb2.PermissionDeniedDetails.AGENT_BANNED)
    status = status_pb2.Status(code=7, message="no")
    for detail in (info, denied):
        status.details.add().Pack(detail)
    again = status_pb2.Status.FromString(status.SerializeToString())
    assert isinstance(again.details[0], any_pb2.Any)
    unpacked = error_details_pb2.ErrorInfo()
    assert again.details[0].Unpack(unpacked)
    assert unpacked == info
    assert not again.details[1].Unpack(unpacked)
    assert again.details[1].Is(spire_status_pb2.PermissionDeniedDetails.DESCRIPTOR)
    shown = json_format.MessageToDict(status, descriptor_pool=POOL)
    assert json_format.ParseDict(shown, status_pb2.Status(), descriptor_pool=POOL) == status


def test_times_wrappers_and_empty() -> None:
    moment = dt.datetime(2030, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(moment)
    assert stamp.ToDatetime(dt.UTC) == moment
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromTimedelta(dt.timedelta(seconds=1.5))
    assert retry.retry_delay == duration_pb2.Duration(seconds=1, nanos=500_000_000)
    asked = entry_service_pb2.ListEntriesRequest.Filter(by_hint=wrappers_pb2.StringValue(value=""))
    assert asked.HasField("by_hint")
    assert not asked.HasField("by_downstream")
    assert empty_pb2.Empty().SerializeToString() == b""


def test_nested_classes_enums_and_optional_fields() -> None:
    assert selector_pb2.SelectorMatch.MATCH_ANY == 3
    assert selector_pb2.SelectorMatch.MatchBehavior.Name(2) == "MATCH_SUPERSET"
    attributes = entry_pb2.Entry.AdditionalAttributes(jwt_svid_include_jti=True)
    entry = entry_pb2.Entry(id="1", additional_attributes=attributes)
    assert type(entry.additional_attributes) is entry_pb2.Entry.AdditionalAttributes
    assert not entry_pb2.Entry().HasField("additional_attributes")
    assert entry_pb2.Entry.AdditionalAttributes.__qualname__ == "Entry.AdditionalAttributes"
    assert entry_pb2.Entry.__module__ == "broker._proto.spire.api.types.entry_pb2"
