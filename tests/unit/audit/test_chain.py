import hashlib
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from broker.audit import GENESIS, ChainHead, Event, Record, append
from broker.audit.chain import link_hash

NOW = datetime(2026, 11, 22, tzinfo=UTC)
LINKS = st.tuples(st.integers(0, 2**63 - 1), st.binary(max_size=40), st.binary(max_size=40))


def test_a_link_holds_the_hash_of_all_before_it() -> None:
    first = append(GENESIS, Record(Event.SERVER_STARTED, NOW, "server", "server", {}))
    second = append(first.head, Record(Event.SERVER_STOPPED, NOW, "server", "server", {}))
    assert (first.seq, first.prev) == (1, GENESIS.hash)
    assert (second.seq, second.prev) == (2, first.hash)
    assert second.head == ChainHead(2, second.hash)
    assert GENESIS.seq == 0
    assert len({GENESIS.hash, first.hash, second.hash}) == 3


def test_the_encoding_is_written_down() -> None:
    # Rows of years ago must verify: this number never changes.
    expected = hashlib.sha256(
        b"broker audit link v1\x00" + (7).to_bytes(8) + (32).to_bytes(8) + bytes(32) + (2).to_bytes(8) + b"{}"
    ).digest()
    assert link_hash(7, bytes(32), b"{}") == expected
    assert GENESIS.hash == hashlib.sha256(b"broker audit genesis v1\x00").digest()


@given(LINKS, LINKS)
def test_two_links_never_have_the_same_hash(one: tuple[int, bytes, bytes], other: tuple[int, bytes, bytes]) -> None:
    assert (link_hash(*one) == link_hash(*other)) == (one == other)


def test_a_record_is_not_shown_in_a_repr() -> None:
    link = append(GENESIS, Record(Event.SERVER_STARTED, NOW, "somebody", "server", {}))
    assert "somebody" not in repr(link)
