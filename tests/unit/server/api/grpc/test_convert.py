from datetime import UTC, datetime

import pytest

from broker._proto.broker.server.v1.entries_pb2 import RegisteredEntry
from broker._proto.spire.api.types import entry_pb2, selector_pb2, spiffeid_pb2
from broker.errors import Conflict, Invalid, NotFound
from broker.server.api.grpc import convert
from broker.spiffe import SpiffeId, TrustDomain
from tests.unit.server.identity.test_changes import FULL

HOME = TrustDomain("example.org")
NOW = datetime(2026, 11, 22, 12, 0, 0, 5, tzinfo=UTC)


def test_an_entry_goes_out_and_comes_back():
    message = convert.registered_entry_message(FULL)
    back = convert.registered_entry_of(message, "unused", NOW, HOME)
    # Who made it when, and how often it changed, is the server's to say.
    assert back.created_at == NOW.replace(microsecond=0)
    assert back.revision == 0
    assert convert.registered_entry_message(back) == _made_now(message)


def _made_now(message: RegisteredEntry) -> RegisteredEntry:
    copy = RegisteredEntry()
    copy.CopyFrom(message)
    copy.entry.created_at = int(NOW.timestamp())
    copy.entry.revision_number = 0
    return copy


def test_an_entry_gets_an_id_if_it_has_none():
    message = entry_pb2.Entry(
        spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path="/a"),
        parent_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path="/b"),
        selectors=[selector_pb2.Selector(type="unix", value="uid:1")],
    )
    assert convert.entry_of(message, "made", NOW, HOME).id == "made"
    message.id = "own"
    assert convert.entry_of(message, "made", NOW, HOME).id == "own"


def test_what_an_update_names():
    message = entry_pb2.Entry(hint="b", x509_svid_ttl=5)
    assert convert.entry_edits(message, entry_pb2.EntryMask(hint=True), HOME) == {"hint": "b"}
    with pytest.raises(Invalid):
        # Without a mask every field is meant, and this one has no SPIFFE ID.
        convert.entry_edits(message, None, HOME)


@pytest.mark.parametrize(
    ("trust_domain", "path"),
    [("", "/a"), ("example.org", "a"), ("EXAMPLE.org", "/a"), ("example.org/x", "/a"), ("a", "/..")],
)
def test_a_spiffe_id_is_read_strictly(trust_domain, path):
    with pytest.raises(Invalid):
        convert.spiffe_id_of(spiffeid_pb2.SPIFFEID(trust_domain=trust_domain, path=path))


def test_a_spiffe_id_comes_back():
    for text in ("spiffe://example.org", "spiffe://example.org/a/b"):
        assert convert.spiffe_id_of(convert.spiffe_id_message(SpiffeId(text))) == SpiffeId(text)


@pytest.mark.parametrize("seconds", [-1, convert.MAX_TIME + 1, 1 << 62])
def test_times_have_bounds(seconds):
    with pytest.raises(Invalid):
        convert.moment_of(seconds)


def test_zero_is_no_time():
    assert convert.moment_of(0) is None
    assert convert.seconds(None) == 0
    assert convert.seconds(convert.moment_of(7)) == 7


def test_a_mask_clears_what_it_leaves_out():
    message = convert.apply_mask(convert.entry_message(FULL), entry_pb2.EntryMask(spiffe_id=True))
    assert message == entry_pb2.Entry(id=FULL.id, spiffe_id=convert.spiffe_id_message(FULL.spiffe_id))


def test_items_fail_by_the_same_table_as_calls():
    assert convert.ok_status().code == 0
    codes = [convert.error_status(error).code for error in (Invalid("x"), NotFound("x"), Conflict("x"))]
    assert codes == [3, 5, 6]


def test_an_unknown_way_to_compare_is_refused():
    with pytest.raises(Invalid):
        convert.selector_filter(
            selector_pb2.SelectorMatch(selectors=[selector_pb2.Selector(type="a", value="b")], match=9)
        )
