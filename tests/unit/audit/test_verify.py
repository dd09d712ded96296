from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from broker.audit import GENESIS, ChainBroken, ChainedRecord, ChainHead, Event, Record, append, verify_chain
from broker.audit.chain import link_hash

NOW = datetime(2026, 11, 22, tzinfo=UTC)


def chain(length: int, start: ChainHead = GENESIS, actor: str = "server") -> list[ChainedRecord]:
    rows: list[ChainedRecord] = []
    for number in range(length):
        record = Record(Event.TASK_STARTED, NOW + timedelta(seconds=number), actor, f"tsk_{number}", {"depth": number})
        rows.append(append(rows[-1].head if rows else start, record))
    return rows


ROWS = chain(12)
HEAD = ROWS[-1].head


def first_bad(rows: Sequence[ChainedRecord], expect: ChainHead | None = None) -> int:
    with pytest.raises(ChainBroken) as broken:
        verify_chain(rows, expect=expect)
    assert broken.value.reason == "audit_chain_broken"
    assert f"record {broken.value.sequence}:" in broken.value.message
    return broken.value.sequence


def rehashed(rows: Sequence[ChainedRecord], place: int, body: bytes) -> list[ChainedRecord]:
    """Write the chain anew from a place on, as somebody who holds the whole database could."""
    made = list(rows[:place])
    for row in [replace(rows[place], body=body), *rows[place + 1 :]]:
        prev = made[-1].hash if made else GENESIS.hash
        made.append(ChainedRecord(row.seq, prev, row.body, link_hash(row.seq, prev, row.body)))
    return made


def test_an_untouched_chain_leads_to_its_head() -> None:
    assert verify_chain([]) == GENESIS
    assert verify_chain(ROWS) == HEAD
    assert verify_chain(iter(ROWS), expect=HEAD) == HEAD
    assert verify_chain(ROWS, expect=ROWS[4].head) == HEAD
    assert verify_chain(ROWS, expect=GENESIS) == HEAD
    assert verify_chain(ROWS[5:], start=ROWS[4].head, expect=HEAD) == HEAD


@pytest.mark.bears("L01", "SV06")
@given(st.integers(0, 11), st.sampled_from(["body", "hash", "prev"]), st.integers(0, 10**6), st.integers(1, 255))
def test_an_edit_is_found_where_it_is(place: int, part: str, where: int, flip: int) -> None:
    value = bytearray(getattr(ROWS[place], part))
    value[where % len(value)] ^= flip
    rows = list(ROWS)
    rows[place] = replace(rows[place], **{part: bytes(value)})
    assert first_bad(rows) == place + 1


@pytest.mark.bears("L01")
@given(st.integers(0, 11), st.binary(max_size=200))
def test_another_body_is_found(place: int, body: bytes) -> None:
    assume(body != ROWS[place].body)
    rows = list(ROWS)
    rows[place] = replace(rows[place], body=body)
    assert first_bad(rows) == place + 1


@pytest.mark.bears("L01")
@given(st.sets(st.integers(0, 10), min_size=1))
def test_a_deletion_is_found(gone: set[int]) -> None:
    # The last record stays: losing that is a truncation.
    rows = [row for place, row in enumerate(ROWS) if place not in gone]
    assert first_bad(rows) == min(gone) + 1


@pytest.mark.bears("L01")
@given(st.permutations(range(12)))
def test_another_order_is_found(order: list[int]) -> None:
    assume(order != list(range(12)))
    expected = next(place for place, number in enumerate(order) if place != number)
    assert first_bad([ROWS[number] for number in order]) == expected + 1


@pytest.mark.bears("L01")
@given(st.integers(0, 12), st.integers(0, 11))
def test_a_record_that_was_never_written_is_found(place: int, copied: int) -> None:
    rows = list(ROWS)
    rows.insert(place, replace(ROWS[copied], body=b"{}"))
    assert first_bad(rows) == place + 1


@pytest.mark.bears("L01")
@given(st.integers(0, 11))
def test_a_truncation_is_found_against_the_head_that_was_kept(length: int) -> None:
    assert verify_chain(ROWS[:length]).seq == length
    assert first_bad(ROWS[:length], expect=HEAD) == length + 1


@pytest.mark.bears("L01")
@given(st.integers(0, 11))
def test_a_chain_written_anew_is_found_against_the_head_that_was_kept(place: int) -> None:
    rows = rehashed(ROWS, place, b'{"forged":true}')
    assert verify_chain(rows).seq == 12
    assert first_bad(rows, expect=HEAD) == 12
    assert first_bad(rows, expect=ROWS[place].head) == place + 1


@pytest.mark.bears("L01")
@given(st.integers(1, 11))
def test_the_tail_of_another_chain_is_found(place: int) -> None:
    # Each link of it is right by itself, numbers included.
    other = chain(12, actor="other")
    assert verify_chain(other).seq == 12
    assert first_bad([*ROWS[:place], *other[place:]]) == place + 1


@pytest.mark.bears("L01")
def test_a_fork_and_a_rolled_back_copy_are_found() -> None:
    fork = [*ROWS[:6], *chain(9, ROWS[5].head, actor="other")]
    assert verify_chain(fork).seq == 15
    assert first_bad(fork, expect=HEAD) == 12
    assert first_bad(fork[:9], expect=HEAD) == 10


def test_rows_numbered_as_no_chain_is_are_refused() -> None:
    assert first_bad([replace(ROWS[0], seq=0)]) == 1
    assert first_bad([replace(ROWS[0], seq=-1)]) == 1
    assert first_bad([replace(ROWS[0], seq=2**70)]) == 1
    assert first_bad([replace(ROWS[0], prev=b"")]) == 1
    assert first_bad([ROWS[0], ROWS[0]]) == 2
    with pytest.raises(ChainBroken) as broken:
        verify_chain(ROWS, expect=ChainHead(0, bytes(32)))
    assert broken.value.sequence == 1
