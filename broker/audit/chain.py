"""The hash chain: every record holds the hash of all before it.

Responsible for the arithmetic of one link. Nobody who cannot recompute every later hash, and replace the copy of the head
that is kept elsewhere, can change a record unseen. Keeping rows is the store's; checking a whole chain is
:mod:`broker.audit.verify`.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Final

from broker.audit.records import Record

HASH_BYTES: Final = 32
MAX_SEQ: Final = 2**63 - 1
"""Largest sequence number: a signed 64-bit column."""

# Domain separation: no hash of another purpose, and no link of another form, can stand in a chain.
_LINK: Final = b"broker audit link v1\x00"
_GENESIS: Final = b"broker audit genesis v1\x00"


@dataclass(frozen=True, slots=True)
class ChainHead:
    """The end of a chain: how many records there are, and the hash over all of them."""

    seq: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class ChainedRecord:
    """One link: the record's canonical bytes between the hash before and the hash after. Numbers start at 1."""

    seq: int
    prev: bytes
    body: bytes = field(repr=False)
    hash: bytes

    @property
    def head(self) -> ChainHead:
        """The chain's end if this is its last link."""
        return ChainHead(self.seq, self.hash)


GENESIS: Final = ChainHead(0, hashlib.sha256(_GENESIS).digest())
"""The head of the empty chain."""


def append(head: ChainHead, record: Record) -> ChainedRecord:
    """Link a record to the head; the link's own head is the next one."""
    seq, body = head.seq + 1, record.body()
    return ChainedRecord(seq, head.hash, body, link_hash(seq, head.hash, body))


def link_hash(seq: int, prev: bytes, body: bytes) -> bytes:
    """Hash one link: SHA-256 over a purpose, the number, the hash before and the body, each of known length."""
    # Fixed widths and a length before the only part that varies: no two links have the same bytes.
    return hashlib.sha256(
        b"".join((_LINK, seq.to_bytes(8), len(prev).to_bytes(8), prev, len(body).to_bytes(8), body))
    ).digest()
