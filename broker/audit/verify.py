"""Checking a chain of audit records from the rows alone: offline, in one pass, with no memory of what passed.

A chain alone shows edits, removals in the middle and reordering. That its end was cut off, or that the whole was written
anew, shows only against a head that was kept elsewhere: give it as ``expect``.
"""

from collections.abc import Iterable

from broker.audit.chain import GENESIS, HASH_BYTES, MAX_SEQ, ChainedRecord, ChainHead, link_hash
from broker.errors import Invalid


class ChainBroken(Invalid):
    """The chain does not hold; ``sequence`` is the number of the first record that is not what was written."""

    code = "audit_chain_broken"

    def __init__(self, message: str, sequence: int) -> None:
        """Name the first bad record."""
        super().__init__(
            f"record {sequence}: {message}", hint="keep this copy: everything before that number is as it was written"
        )
        self.sequence = sequence


def verify_chain(
    rows: Iterable[ChainedRecord], *, start: ChainHead = GENESIS, expect: ChainHead | None = None
) -> ChainHead:
    """Check the rows that follow ``start``, in order, and give the head that they lead to; raises ChainBroken.

    ``expect`` is a head known from elsewhere: the chain must pass through it, so a shorter or rewritten one is refused.
    """
    head = start
    _check_expected(head, expect)
    for row in rows:
        _check_link(row, head)
        head = row.head
        _check_expected(head, expect)
    if expect is not None and head.seq < expect.seq:
        raise ChainBroken(f"it is missing: {expect.seq} records were there", head.seq + 1)
    return head


def _check_link(row: ChainedRecord, head: ChainHead) -> None:
    wanted = head.seq + 1
    # Rows may come from anywhere: their numbers and lengths are judged before they are used.
    if row.seq != wanted or not 0 < row.seq <= MAX_SEQ:
        raise ChainBroken(f"number {row.seq} stands in its place", wanted)
    if len(row.prev) != HASH_BYTES or row.prev != head.hash:
        raise ChainBroken("it does not follow the record before it", wanted)
    if row.hash != link_hash(row.seq, row.prev, row.body):
        raise ChainBroken("its content is not what was hashed", wanted)


def _check_expected(head: ChainHead, expect: ChainHead | None) -> None:
    if expect is not None and head.seq == expect.seq and head.hash != expect.hash:
        raise ChainBroken("the chain up to here is not the one whose head was kept", max(head.seq, 1))
