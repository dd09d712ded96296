"""Reading the server's messages."""

import pytest

from broker._proto.spire.api.types import bundle_pb2
from broker.agent import wire
from broker.errors import Invalid, InvalidBundle
from tests.fakes.fake_server import TD, FakeCa, entry_message


def test_an_entry_keeps_every_field() -> None:
    message = entry_message(
        "e1", "/a", ["unix:uid:1"], hint="h", federates_with=["other.example"], revision=7, ttl=60,
        allowed_audiences=["x"], may_start_tasks=True, description="d", owner="o",
    )  # fmt: skip
    message.entry.expires_at = 1_900_000_000
    message.entry.dns_names.append("a.example")
    message.entry.additional_attributes.disable_x509_svid_prefetch = True
    message.entry.additional_attributes.jwt_svid_include_jti = True
    entry = wire.entry(message, TD)
    assert (str(entry.spiffe_id), entry.hint, entry.revision, entry.x509_svid_ttl) == (
        "spiffe://example.org/a",
        "h",
        7,
        60,
    )
    assert {str(one) for one in entry.federates_with} == {"other.example"}
    assert (entry.may_start_tasks, entry.description, entry.owner, entry.allowed_audiences) == (True, "d", "o", {"x"})
    assert entry.expires_at.timestamp() == 1_900_000_000
    assert entry.dns_names == ("a.example",)
    assert entry.disable_x509_svid_prefetch
    assert entry.jwt_svid_include_jti
    assert wire.entry(wire.entry_message(entry), TD) == entry


@pytest.mark.parametrize(
    "spoil",
    [
        lambda e: e.entry.ClearField("selectors"),
        lambda e: setattr(e.entry.spiffe_id, "trust_domain", "other.example"),
        lambda e: setattr(e.entry.spiffe_id, "path", "/spire/server"),
        lambda e: setattr(e.entry.spiffe_id, "path", "a"),
        lambda e: setattr(e.entry, "created_at", 1 << 62),
        lambda e: e.entry.selectors.add(type="a:b", value="c"),
    ],
)
@pytest.mark.bears("O06")
def test_a_bad_entry_is_refused(spoil) -> None:
    message = entry_message("e1", "/a", ["unix:uid:1"])
    wire.entry(message, TD)
    spoil(message)
    with pytest.raises(Invalid):
        wire.entry(message, TD)


@pytest.mark.bears("O06")
def test_a_bad_bundle_is_refused() -> None:
    ca = FakeCa()
    good = ca.message()
    assert wire.bundle(good).bundle.x509_authorities == (ca.root,)
    for spoil in (
        lambda b: b.x509_authorities.add(asn1=b"nonsense"),
        lambda b: b.jwt_authorities.add(public_key=b"nonsense", key_id="x"),
        lambda b: b.jwt_authorities.add(public_key=b.jwt_authorities[0].public_key, key_id=ca.kid),
        lambda b: b.jwt_authorities.add(public_key=b.jwt_authorities[0].public_key, key_id=""),
    ):
        message = bundle_pb2.Bundle()
        message.CopyFrom(good)
        spoil(message)
        with pytest.raises(InvalidBundle):
            wire.bundle(message)
