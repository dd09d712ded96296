"""``spire.api.server.entry.v1.Entry``: SPIRE's API of registration entries, for operators and for SPIRE's agents."""

import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from broker._proto.service import Context, ServiceBinding
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker._proto.spire.api.types import entry_pb2 as types_pb2
from broker._proto.spire.api.types import status_pb2
from broker.clock import Clock
from broker.errors import BrokerError, Conflict, Invalid, NotFound
from broker.registry.entry import Entry as RegistryEntry
from broker.registry.entry import Unstorable
from broker.server.api.access import Caller, agent_of, name_of
from broker.server.api.grpc import convert, identities
from broker.server.api.grpc.identities import reading
from broker.server.api.grpc.paging import in_parts, pages
from broker.server.identity.directory import Directory
from broker.server.identity.entries import MAX_BATCH, STRANGER, Edit, Entries, Similar
from broker.server.identity.filters import EntryFilter, entry_order, entry_token
from broker.spiffe import TrustDomain

BINDING: Final = ServiceBinding.of(entry_pb2.DESCRIPTOR, "Entry")
SYNC_PAGE: Final = 500
"""Entries or revisions of one message of SyncAuthorizedEntries, as in SPIRE."""
ENTRY_ID_BYTES: Final = 16

T = TypeVar("T")


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
        wanted = entry_filter(request.filter, self._entries.trust_domain)
        return entry_pb2.CountEntriesResponse(count=self._entries.count(wanted))

    async def ListEntries(  # noqa: N802
        self, request: entry_pb2.ListEntriesRequest, context: Context, caller: Caller
    ) -> entry_pb2.ListEntriesResponse:
        """List entries, oldest first; all of them where no page size is given, as in SPIRE."""
        size = max(0, request.page_size)
        wanted = entry_filter(request.filter, self._entries.trust_domain)
        page = self._entries.find(wanted, size, entry_token(request.page_token) if size else "")
        shown = [_shown(entry, request) for entry in page.items]
        if not size:
            return entry_pb2.ListEntriesResponse(entries=shown)
        fitting, more = next(pages(shown, size))
        following = entry_order(page.items[len(fitting) - 1]) if more else page.next
        return entry_pb2.ListEntriesResponse(entries=fitting, next_page_token=following)

    async def GetEntry(  # noqa: N802
        self, request: entry_pb2.GetEntryRequest, context: Context, caller: Caller
    ) -> types_pb2.Entry:
        """Show one entry."""
        if not request.id:
            raise Invalid("missing ID", code="missing_id")
        return _shown(self._entries.get(request.id), request)

    async def BatchCreateEntry(  # noqa: N802
        self, request: entry_pb2.BatchCreateEntryRequest, context: Context, caller: Caller
    ) -> entry_pb2.BatchCreateEntryResponse:
        """Create entries, each with its own status; one that is there already is shown."""
        now, home = self._clock.now(), self._entries.trust_domain
        drafts = [attempt(partial(convert.entry_of, message, new_entry_id(), now, home)) for message in request.entries]
        results = []
        for outcome in await in_parts(drafts, MAX_BATCH, partial(self._entries.create, actor=name_of(caller))):
            result = entry_pb2.BatchCreateEntryResponse.Result(status=_status(outcome, "failed to create entry"))
            shown = outcome.existing if isinstance(outcome, Similar) else outcome
            if isinstance(shown, RegistryEntry):
                result.entry.CopyFrom(_shown(shown, request))
            results.append(result)
        return entry_pb2.BatchCreateEntryResponse(results=results)

    async def BatchUpdateEntry(  # noqa: N802
        self, request: entry_pb2.BatchUpdateEntryRequest, context: Context, caller: Caller
    ) -> entry_pb2.BatchUpdateEntryResponse:
        """Change the fields that the mask names, or all without a mask."""
        mask, home = request.input_mask if request.HasField("input_mask") else None, self._entries.trust_domain
        edits = [(message.id, attempt(partial(_edit, message, mask, home))) for message in request.entries]
        results = []
        for outcome in await in_parts(edits, MAX_BATCH, partial(self._entries.update, actor=name_of(caller))):
            result = entry_pb2.BatchUpdateEntryResponse.Result(status=_status(outcome, "failed to update entry"))
            if isinstance(outcome, RegistryEntry):
                result.entry.CopyFrom(_shown(outcome, request))
            results.append(result)
        return entry_pb2.BatchUpdateEntryResponse(results=results)

    async def BatchDeleteEntry(  # noqa: N802
        self, request: entry_pb2.BatchDeleteEntryRequest, context: Context, caller: Caller
    ) -> entry_pb2.BatchDeleteEntryResponse:
        """Delete entries."""
        outcomes = await in_parts(request.ids, MAX_BATCH, partial(self._entries.delete, actor=name_of(caller)))
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
        if first is None:
            return
        _check_first(first)
        agent_id = agent_of(caller).id
        entries = self._directory.authorized(agent_id)
        if len(entries) <= SYNC_PAGE:
            page, more = next(pages((_shown(entry, first) for entry in entries), SYNC_PAGE))
            if not more:
                yield entry_pb2.SyncAuthorizedEntriesResponse(entries=page)
                return
        for revisions, more in pages(map(_revision, entries), SYNC_PAGE):
            yield entry_pb2.SyncAuthorizedEntriesResponse(entry_revisions=revisions, more=more)
        async for wanted in request:
            found = (self._directory.authorized_entry(agent_id, one) for one in sorted(wanted.ids))
            shown = (_shown(entry, first) for entry in found if entry is not None)
            for page, more in pages(shown, SYNC_PAGE):
                yield entry_pb2.SyncAuthorizedEntriesResponse(entries=page, more=more)


def new_entry_id() -> str:
    """Make an id for an entry that came without one: 128 random bits."""
    return secrets.token_hex(ENTRY_ID_BYTES)


def attempt(read: Callable[[], T]) -> T | BrokerError:
    """Read one item of a batch; its failure is its own."""
    try:
        with _converting():
            return read()
    except Invalid as error:
        return error


@contextmanager
def _converting() -> Iterator[None]:
    try:
        yield
    except Unstorable:
        raise
    except Invalid as error:
        raise Invalid(f"failed to convert entry: {error.message}", code=error.reason, hint=error.hint) from None


def edit_by(changes: Mapping[str, Any]) -> Edit:
    """Make an edit of these fields; what they make of the entry may be Invalid."""

    def edited(entry: RegistryEntry) -> RegistryEntry:
        with _converting():
            return replace(entry, **changes)

    return edited


def status_of(outcome: RegistryEntry | Similar | BrokerError) -> status_pb2.Status:
    """Write one item's status."""
    if isinstance(outcome, Similar):
        return status_pb2.Status(code=6, message="similar entry already exists")  # ALREADY_EXISTS
    return convert.error_status(outcome) if isinstance(outcome, BrokerError) else convert.ok_status()


def _status(outcome: RegistryEntry | Similar | BrokerError, failed: str) -> status_pb2.Status:
    """Write one item's status in the words that SPIRE's tools know."""
    if isinstance(outcome, NotFound) and outcome.reason == STRANGER:
        return status_pb2.Status(code=13, message=f"{failed}: {outcome.message}")  # INTERNAL
    if isinstance(outcome, NotFound):
        return status_pb2.Status(code=5, message=failed)  # NOT_FOUND
    if isinstance(outcome, Unstorable):
        return status_pb2.Status(
            code=3, message=f"{failed}: datastore-validation: {outcome.message}"
        )  # INVALID_ARGUMENT
    if isinstance(outcome, Conflict):
        return status_pb2.Status(code=6, message=f"{failed}: {outcome.message}")  # ALREADY_EXISTS
    return status_of(outcome)


def entry_filter(
    message: entry_pb2.ListEntriesRequest.Filter | entry_pb2.CountEntriesRequest.Filter, trust_domain: TrustDomain
) -> EntryFilter:
    """Read a filter; raises Invalid. An empty hint does not narrow, as in SPIRE."""
    spiffe_id = parent_id = selectors = federates_with = None
    if message.HasField("by_parent_id"):
        with reading("malformed parent ID filter"):
            parent_id = identities.member(convert.spiffe_id_of(message.by_parent_id), trust_domain)
    if message.HasField("by_spiffe_id"):
        with reading("malformed SPIFFE ID filter"):
            spiffe_id = identities.workload(convert.spiffe_id_of(message.by_spiffe_id), trust_domain)
    if message.HasField("by_selectors"):
        with reading("malformed selectors filter"):
            selectors = convert.selector_filter(message.by_selectors)
    if message.HasField("by_federates_with"):
        with reading("malformed federates with filter"):
            federates_with = convert.federation_filter(message.by_federates_with)
    return EntryFilter(
        spiffe_id=spiffe_id,
        parent_id=parent_id,
        selectors=selectors,
        federates_with=federates_with,
        hint=message.by_hint.value or None,
        downstream=message.by_downstream.value if message.HasField("by_downstream") else None,
    )


def _check_first(request: entry_pb2.SyncAuthorizedEntriesRequest) -> None:
    if request.ids:
        raise Invalid("specifying IDs on initial request is not supported", code="sync_order")
    if request.HasField("output_mask") and not request.output_mask.revision_number:
        # By it the agent tells what it must ask for.
        raise Invalid("revision number cannot be masked", code="sync_mask")


def _revision(entry: RegistryEntry) -> entry_pb2.EntryRevision:
    return entry_pb2.EntryRevision(
        id=entry.id, revision_number=entry.revision, created_at=convert.seconds(entry.created_at)
    )


def _edit(message: types_pb2.Entry, mask: types_pb2.EntryMask | None, home: TrustDomain) -> Edit:
    return edit_by(convert.entry_edits(message, mask, home))


def _shown(entry: RegistryEntry, request: object) -> types_pb2.Entry:
    message = convert.entry_message(entry)
    if request.HasField("output_mask"):  # type: ignore[attr-defined]  # every request that comes here has one
        convert.apply_mask(message, request.output_mask)  # type: ignore[attr-defined]  # as above
    return message
