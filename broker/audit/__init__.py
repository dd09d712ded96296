"""The audit log's rules: what is recorded, how records are chained, and how a chain is checked. Keeps nothing itself."""

from broker.audit.chain import GENESIS, ChainedRecord, ChainHead, append
from broker.audit.events import Event
from broker.audit.records import Record
from broker.audit.verify import ChainBroken, verify_chain

__all__ = ["GENESIS", "ChainBroken", "ChainHead", "ChainedRecord", "Event", "Record", "append", "verify_chain"]
