"""``broker.server.v1.Entries``: registration entries with the fields that SPIRE's message lacks."""

from dataclasses import replace
from functools import partial
from typing import Final

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.service import Context, ServiceBinding
from broker.clock import Clock
from broker.registry.entry import Entry as RegistryEntry
from broker.server.api.access import Caller, name_of
from broker.server.api.grpc.convert import registered_entry_edits, registered_entry_message, registered_entry_of
from broker.server.api.grpc.entry import attempt, edit_by, entry_filter, new_entry_id, status_of
from broker.server.api.grpc.paging import pages
from broker.server.identity.entries import Edit, Similar
from broker.server.identity.entries import Entries as EntryCases
from broker.server.identity.filters import EntryFilter, entry_order, entry_token
from broker.spiffe import TrustDomain

BINDING: Final = ServiceBinding.of(entries_pb2.DESCRIPTOR, "Entries")


class Entries:
    """The service, over its use cases."""

    def __init__(self, entries: EntryCases, clock: Clock) -> None:
        self._entries = entries
        self._clock = clock

    async def BatchCreateEntry(  # noqa: N802  # the name on the wire
        self, request: entries_pb2.BatchCreateEntryRequest, context: Context, caller: Caller
    ) -> entries_pb2.BatchCreateEntryResponse:
        """Create entries, each with its own status; one that is there already is shown."""
        now, home = self._clock.now(), self._entries.trust_domain
        drafts = [
            attempt(partial(registered_entry_of, message, new_entry_id(), now, home)) for message in request.entries
        ]
        results = []
        for outcome in await self._entries.create(drafts, name_of(caller)):
            result = entries_pb2.BatchCreateEntryResponse.Result(status=status_of(outcome))
            shown = outcome.existing if isinstance(outcome, Similar) else outcome
            if isinstance(shown, RegistryEntry):
                result.entry.CopyFrom(registered_entry_message(shown))
            results.append(result)
        return entries_pb2.BatchCreateEntryResponse(results=results)

    async def BatchUpdateEntry(  # noqa: N802
        self, request: entries_pb2.BatchUpdateEntryRequest, context: Context, caller: Caller
    ) -> entries_pb2.BatchUpdateEntryResponse:
        """Change the fields that the mask names, or all without a mask."""
        mask, home = request.input_mask if request.HasField("input_mask") else None, self._entries.trust_domain
        edits = [(message.entry.id, attempt(partial(_edit, message, mask, home))) for message in request.entries]
        results = []
        for outcome in await self._entries.update(edits, name_of(caller)):
            result = entries_pb2.BatchUpdateEntryResponse.Result(status=status_of(outcome))
            if isinstance(outcome, RegistryEntry):
                result.entry.CopyFrom(registered_entry_message(outcome))
            results.append(result)
        return entries_pb2.BatchUpdateEntryResponse(results=results)

    async def GetEntry(  # noqa: N802
        self, request: entries_pb2.GetEntryRequest, context: Context, caller: Caller
    ) -> entries_pb2.RegisteredEntry:
        """Show one entry."""
        return registered_entry_message(self._entries.get(request.id))

    async def ListEntries(  # noqa: N802
        self, request: entries_pb2.ListEntriesRequest, context: Context, caller: Caller
    ) -> entries_pb2.ListEntriesResponse:
        """List entries, oldest first."""
        page = self._entries.find(self._wanted(request.filter), request.page_size, entry_token(request.page_token))
        shown = [registered_entry_message(entry) for entry in page.items]
        fitting, more = next(pages(shown, request.page_size or len(shown)))
        following = entry_order(page.items[len(fitting) - 1]) if more else page.next
        return entries_pb2.ListEntriesResponse(entries=fitting, next_page_token=following)

    async def CountEntries(  # noqa: N802
        self, request: entries_pb2.CountEntriesRequest, context: Context, caller: Caller
    ) -> entries_pb2.CountEntriesResponse:
        """Count entries."""
        return entries_pb2.CountEntriesResponse(count=self._entries.count(self._wanted(request.filter)))

    def _wanted(self, message: entries_pb2.EntryFilter) -> EntryFilter:
        wanted = entry_filter(message.entry, self._entries.trust_domain)
        return replace(wanted, owner=message.owner) if message.HasField("owner") else wanted


def _edit(
    message: entries_pb2.RegisteredEntry, mask: entries_pb2.RegisteredEntryMask | None, home: TrustDomain
) -> Edit:
    return edit_by(registered_entry_edits(message, mask, home))
