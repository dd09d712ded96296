"""Registration entries, with the fields that SPIRE's own message lacks (``broker.server.v1.Entries``)."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import grpc.aio

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.service import ServiceBinding
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker._proto.spire.api.types import status_pb2
from broker.client.calls import DEADLINE_SECONDS, PAGE_SIZE, Caller, require_ok

_OURS = ServiceBinding.of(entries_pb2.DESCRIPTOR, "Entries")
T = TypeVar("T")
_SPIRE = ServiceBinding.of(entry_pb2.DESCRIPTOR, "Entry")


class Entries:
    """What an operator does with entries."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._ours = Caller(channel, _OURS, timeout=timeout)
        self._spire = Caller(channel, _SPIRE, timeout=timeout)

    async def create(self, entry: entries_pb2.RegisteredEntry) -> entries_pb2.RegisteredEntry:
        """Create one entry; raises Conflict when a similar one is there, Invalid for what the server cannot accept."""
        request = entries_pb2.BatchCreateEntryRequest(entries=[entry])
        answer: entries_pb2.BatchCreateEntryResponse = await self._ours.call("BatchCreateEntry", request)
        (result,) = answer.results
        require_ok(result.status, "the entry was not created")
        return result.entry

    async def get(self, entry_id: str) -> entries_pb2.RegisteredEntry:
        """Give one entry; raises NotFound."""
        entry: entries_pb2.RegisteredEntry = await self._ours.call("GetEntry", entries_pb2.GetEntryRequest(id=entry_id))
        return entry

    async def list(self, wanted: entries_pb2.EntryFilter | None = None) -> Sequence[entries_pb2.RegisteredEntry]:
        """Give all entries, or those that a filter keeps, page by page."""
        found: list[entries_pb2.RegisteredEntry] = []
        token = ""
        while True:
            request = entries_pb2.ListEntriesRequest(page_size=PAGE_SIZE, page_token=token, filter=wanted)
            page: entries_pb2.ListEntriesResponse = await self._ours.call("ListEntries", request)
            found.extend(page.entries)
            token = page.next_page_token
            if not token:
                return found

    async def count(self, wanted: entries_pb2.EntryFilter | None = None) -> int:
        """Count all entries, or those that a filter keeps."""
        request = entries_pb2.CountEntriesRequest(filter=wanted)
        answer: entries_pb2.CountEntriesResponse = await self._ours.call("CountEntries", request)
        return answer.count

    async def update(
        self, entry: entries_pb2.RegisteredEntry, mask: entries_pb2.RegisteredEntryMask | None = None
    ) -> entries_pb2.RegisteredEntry:
        """Change the fields that the mask names, or all; raises NotFound, Invalid, or Conflict with a similar entry."""
        request = entries_pb2.BatchUpdateEntryRequest(entries=[entry], input_mask=mask)
        answer: entries_pb2.BatchUpdateEntryResponse = await self._ours.call("BatchUpdateEntry", request)
        (result,) = answer.results
        require_ok(result.status, f"the entry {entry.entry.id} was not changed")
        return result.entry

    async def delete(self, entry_id: str) -> None:
        """Delete one entry; raises NotFound."""
        (status,) = await self.delete_many([entry_id])
        require_ok(status, f"the entry {entry_id} was not deleted")

    # ---- many, in batches: each item has its own status, in the order given

    async def create_many(self, entries: Sequence[entries_pb2.RegisteredEntry]) -> Sequence[status_pb2.Status]:
        """Create entries."""
        found: list[status_pb2.Status] = []
        for batch in _batches(entries):
            answer = await self._ours.call("BatchCreateEntry", entries_pb2.BatchCreateEntryRequest(entries=batch))
            found += [result.status for result in answer.results]
        return found

    async def replace_many(self, entries: Sequence[entries_pb2.RegisteredEntry]) -> Sequence[status_pb2.Status]:
        """Make entries what these are, in every field."""
        found: list[status_pb2.Status] = []
        for batch in _batches(entries):
            answer = await self._ours.call("BatchUpdateEntry", entries_pb2.BatchUpdateEntryRequest(entries=batch))
            found += [result.status for result in answer.results]
        return found

    async def delete_many(self, entry_ids: Sequence[str]) -> Sequence[status_pb2.Status]:
        """Delete entries."""
        found: list[status_pb2.Status] = []
        for batch in _batches(entry_ids):
            answer = await self._spire.call("BatchDeleteEntry", entry_pb2.BatchDeleteEntryRequest(ids=batch))
            found += [result.status for result in answer.results]
        return found


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), PAGE_SIZE):
        yield items[start : start + PAGE_SIZE]
