"""Registration entries, with the fields that SPIRE's own message lacks (``broker.server.v1.Entries``)."""

from collections.abc import Sequence

import grpc.aio

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.service import ServiceBinding
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker.client.calls import DEADLINE_SECONDS, PAGE_SIZE, Caller, require_ok

_OURS = ServiceBinding.of(entries_pb2.DESCRIPTOR, "Entries")
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

    async def list(self) -> Sequence[entries_pb2.RegisteredEntry]:
        """Give all entries, page by page."""
        found: list[entries_pb2.RegisteredEntry] = []
        token = ""
        while True:
            request = entries_pb2.ListEntriesRequest(page_size=PAGE_SIZE, page_token=token)
            page: entries_pb2.ListEntriesResponse = await self._ours.call("ListEntries", request)
            found.extend(page.entries)
            token = page.next_page_token
            if not token:
                return found

    async def delete(self, entry_id: str) -> None:
        """Delete one entry; raises NotFound."""
        request = entry_pb2.BatchDeleteEntryRequest(ids=[entry_id])
        answer: entry_pb2.BatchDeleteEntryResponse = await self._spire.call("BatchDeleteEntry", request)
        (result,) = answer.results
        require_ok(result.status, f"the entry {entry_id} was not deleted")
