"""``spire.api.server.entry.v1.Entry``: SPIRE's API of registration entries, for operators and for SPIRE's agents."""

import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Final

from broker._proto.service import Context, ServiceBinding
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker._proto.spire.api.types import entry_pb2 as types_pb2
from broker._proto.spire.api.types import status_pb2
from broker.clock import Clock
from broker.errors import BrokerError, Invalid
from broker.registry.entry import Entry as RegistryEntry
from broker.server.api.access import Caller, agent_of, name_of
from broker.server.api.grpc import convert
from broker.server.identity.directory import Directory
from broker.server.identity.entries import Entries, Similar
from broker.server.identity.filters import EntryFilter

BINDING: Final = ServiceBinding.of(entry_pb2.DESCRIPTOR, "Entry")
SYNC_PAGE: Final = 500
"""Entries or revisions of one message of SyncAuthorizedEntries, as in SPIRE."""
ENTRY_ID_BYTES: Final = 16


class Entry:
    """The service, over its use cases."""

    def __init__(self, entries: Entries, directory: Directory, clock: Clock) -> None:
        self._entries = entries
        self._directory = directory
        self._clock = clock

    # ---- for operators

    async def CountEntries(  # noqa: N802  # the name on the wire
        self, request: entry_pb2.CountEntriesRequest, context: Context, caller: Caller
    ) -> entry_pb2.CountEntriesResponse:
        """Count entries."""
        return entry_pb2.CountEntriesResponse(count=self._entries.count(_filter(request.filter)))

    async def ListEntries(  # noqa: N802
        self, request: entry_pb2.ListEntriesRequest, context: Context, caller: Caller
    ) -> entry_pb2.ListEntriesResponse:
        """List entries, oldest first."""
        page = self._entries.find(_filter(request.filter), request.page_size, request.page_token)
        return entry_pb2.ListEntriesResponse(
            entries=[_shown(entry, request) for entry in page.items], next_page_token=page.next
        )

    async def GetEntry(  # noqa: N802
        self, request: entry_pb2.GetEntryRequest, context: Context, caller: Caller
    ) -> types_pb2.Entry:
        """Show one entry."""
        return _shown(self._entries.get(request.id), request)

    async def BatchCreateEntry(  # noqa: N802
        self, request: entry_pb2.BatchCreateEntryRequest, context: Context, caller: Caller
    ) -> entry_pb2.BatchCreateEntryResponse:
        """Create entries, each with its own status; one that is there already is shown."""
        now = self._clock.now()
        drafts = [attempt(partial(convert.entry_of, message, new_entry_id(), now)) for message in request.entries]
        results = []
        for outcome in await self._entries.create(drafts, name_of(caller)):
            result = entry_pb2.BatchCreateEntryResponse.Result(status=status_of(outcome))
            shown = outcome.existing if isinstance(outcome, Similar) else outcome
            if isinstance(shown, RegistryEntry):
                result.entry.CopyFrom(_shown(shown, request))
            results.append(result)
        return entry_pb2.BatchCreateEntryResponse(results=results)

    async def BatchUpdateEntry(  # noqa: N802
        self, request: entry_pb2.BatchUpdateEntryRequest, context: Context, caller: Caller
    ) -> entry_pb2.BatchUpdateEntryResponse:
        """Change the fields that the mask names, or all without a mask."""
        mask = request.input_mask if request.HasField("input_mask") else None
        edits = [(message.id, _edit(message, mask)) for message in request.entries]
        results = []
        for outcome in await self._entries.update(edits, name_of(caller)):
            result = entry_pb2.BatchUpdateEntryResponse.Result(status=status_of(outcome))
            if isinstance(outcome, RegistryEntry):
                result.entry.CopyFrom(_shown(outcome, request))
            results.append(result)
        return entry_pb2.BatchUpdateEntryResponse(results=results)

    async def BatchDeleteEntry(  # noqa: N802
        self, request: entry_pb2.BatchDeleteEntryRequest, context: Context, caller: Caller
    ) -> entry_pb2.BatchDeleteEntryResponse:
        """Delete entries."""
        outcomes = await self._entries.delete(request.ids, name_of(caller))
        return entry_pb2.BatchDeleteEntryResponse(
            results=[
                entry_pb2.BatchDeleteEntryResponse.Result(status=status_of(outcome), id=entry_id)
                for entry_id, outcome in zip(request.ids, outcomes, strict=True)
            ]
        )

    # ---- for agents

    async def GetAuthorizedEntries(  # noqa: N802
        self, request: entry_pb2.GetAuthorizedEntriesRequest, context: Context, caller: Caller
    ) -> entry_pb2.GetAuthorizedEntriesResponse:
        """Give the entries that the calling agent may serve."""
        entries = self._directory.authorized(agent_of(caller).id)
        return entry_pb2.GetAuthorizedEntriesResponse(entries=[_shown(entry, request) for entry in entries])

    async def SyncAuthorizedEntries(  # noqa: N802
        self, request: AsyncIterator[entry_pb2.SyncAuthorizedEntriesRequest], context: Context, caller: Caller
    ) -> AsyncIterator[entry_pb2.SyncAuthorizedEntriesResponse]:
        """Give all entries if they fit on a page, else their revisions, and then those that are asked for."""
        first = await anext(request, None)
        if first is None or first.ids:
            raise Invalid("the first request of a synchronisation names no ids", code="sync_order")
        agent_id = agent_of(caller).id
        entries = self._directory.authorized(agent_id)
        if len(entries) <= SYNC_PAGE:
            yield entry_pb2.SyncAuthorizedEntriesResponse(entries=[_shown(entry, first) for entry in entries])
            return
        for page, more in _pages(entries):
            yield entry_pb2.SyncAuthorizedEntriesResponse(
                entry_revisions=[
                    entry_pb2.EntryRevision(
                        id=entry.id, revision_number=entry.revision, created_at=convert.seconds(entry.created_at)
                    )
                    for entry in page
                ],
                more=more,
            )
        async for wanted in request:
            found = [
                entry for one in wanted.ids if (entry := self._directory.authorized_entry(agent_id, one)) is not None
            ]
            for page, more in _pages(found):
                yield entry_pb2.SyncAuthorizedEntriesResponse(
                    entries=[_shown(entry, first) for entry in page], more=more
                )


def new_entry_id() -> str:
    """Make an id for an entry that came without one: 128 random bits."""
    return secrets.token_hex(ENTRY_ID_BYTES)


def attempt(read: Callable[[], RegistryEntry]) -> RegistryEntry | BrokerError:
    """Read one item of a batch; its failure is its own."""
    try:
        return read()
    except Invalid as error:
        return error


def status_of(outcome: RegistryEntry | Similar | BrokerError) -> status_pb2.Status:
    """Write one item's status."""
    if isinstance(outcome, Similar):
        return status_pb2.Status(code=6, message="similar entry already exists")  # ALREADY_EXISTS
    return convert.error_status(outcome) if isinstance(outcome, BrokerError) else convert.ok_status()


def _edit(message: types_pb2.Entry, mask: types_pb2.EntryMask | None) -> Callable[[RegistryEntry], RegistryEntry]:
    # Read where its failure is the item's own.
    return lambda entry: replace(entry, **convert.entry_edits(message, mask))


def _shown(entry: RegistryEntry, request: object) -> types_pb2.Entry:
    message = convert.entry_message(entry)
    if request.HasField("output_mask"):  # type: ignore[attr-defined]  # every request that comes here has one
        convert.apply_mask(message, request.output_mask)  # type: ignore[attr-defined]  # as above
    return message


def _pages(entries: list[RegistryEntry]) -> list[tuple[list[RegistryEntry], bool]]:
    starts = range(0, len(entries), SYNC_PAGE) or range(1)
    return [(entries[start : start + SYNC_PAGE], start != starts[-1]) for start in starts]


def _filter(message: entry_pb2.ListEntriesRequest.Filter | entry_pb2.CountEntriesRequest.Filter) -> EntryFilter:
    return EntryFilter(
        spiffe_id=convert.spiffe_id_of(message.by_spiffe_id) if message.HasField("by_spiffe_id") else None,
        parent_id=convert.spiffe_id_of(message.by_parent_id) if message.HasField("by_parent_id") else None,
        selectors=convert.selector_filter(message.by_selectors) if message.HasField("by_selectors") else None,
        federates_with=(
            convert.federation_filter(message.by_federates_with) if message.HasField("by_federates_with") else None
        ),
        hint=message.by_hint.value if message.HasField("by_hint") else None,
        downstream=message.by_downstream.value if message.HasField("by_downstream") else None,
    )
