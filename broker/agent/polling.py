"""The estate by SPIRE's own methods, for a server that has no Watch stream: asked every few seconds, as SPIRE's agent asks.

Only what changed travels: the server tells each entry's revision, and the entries with another one are asked for. Where
all fit into one page they come at once. An answer counts when it is whole.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc.aio

from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2 as sync_pb2
from broker._proto.spire.api.types import bundle_pb2 as types_pb2
from broker._proto.spire.api.types import entry_pb2
from broker.agent.upstream import RPC_TIMEOUT, Upstream, answered
from broker.errors import NotFound, Unavailable
from broker.transport.rpc_errors import from_rpc_error

POLL_EVERY: Final = 5.0  # seconds, as SPIRE's agent
PAGE: Final = 500  # entries in one question: SPIRE's server gives no more in one answer
MAX_ENTRIES: Final = 1_000_000  # of one node: a server that never ends is broken

Revision = tuple[int, int]
"""Number, and when the entry was made: one that was made again begins its numbers anew."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The estate at one moment: the entries that are new or changed, the ids of those that are gone, every bundle."""

    changed: tuple[entry_pb2.Entry, ...]
    gone: tuple[str, ...]
    bundles: tuple[types_pb2.Bundle, ...]


class Polling:
    """Asks one server. Each answer is the difference to the one before; the first is the whole estate."""

    def __init__(self, upstream: Upstream) -> None:
        """Know nothing yet."""
        self._upstream = upstream
        self._revisions: dict[str, Revision] = {}
        self._federated: dict[str, Sequence[str]] = {}

    async def ask(self) -> Answer:
        """Ask once; raises BrokerError, and then the next answer is the difference to the same as this."""
        changed, revisions = await self._entries()
        federated = {one: names for one, names in self._federated.items() if one in revisions}
        federated |= {one.id: tuple(one.federates_with) for one in changed}
        bundles = await self._bundles({name for names in federated.values() for name in names})
        gone = tuple(self._revisions.keys() - revisions.keys())
        self._revisions, self._federated = revisions, federated
        return Answer(tuple(changed), gone, bundles)

    async def _bundles(self, federated: Iterable[str]) -> tuple[types_pb2.Bundle, ...]:
        service = self._upstream.bundle
        found = [await answered(service.GetBundle(bundle_pb2.GetBundleRequest(), timeout=RPC_TIMEOUT))]
        for name in sorted(federated):
            request = bundle_pb2.GetFederatedBundleRequest(trust_domain=name)
            try:
                found.append(await answered(service.GetFederatedBundle(request, timeout=RPC_TIMEOUT)))
            except NotFound:
                continue  # the entry names it, and the server does not know it any more
        return tuple(found)

    async def _entries(self) -> tuple[list[entry_pb2.Entry], dict[str, Revision]]:
        call = self._upstream.entry.SyncAuthorizedEntries(timeout=RPC_TIMEOUT)
        try:
            entries, revisions = await _asked(call, sync_pb2.SyncAuthorizedEntriesRequest())
            if not revisions:  # they are few, and all here
                revisions = {one.id: (one.revision_number, one.created_at) for one in entries}
                return [one for one in entries if self._revisions.get(one.id) != revisions[one.id]], revisions
            wanted = [one for one, revision in revisions.items() if self._revisions.get(one) != revision]
            changed: list[entry_pb2.Entry] = []
            for start in range(0, len(wanted), PAGE):
                request = sync_pb2.SyncAuthorizedEntriesRequest(ids=wanted[start : start + PAGE])
                changed += (await _asked(call, request))[0]
            # One that was deleted in between is not told; it is gone at the next question.
            told = {one.id for one in changed}
            return changed, {
                one: revision
                for one, revision in revisions.items()
                if one in told or self._revisions.get(one) == revision
            }
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INTERNAL:
                await self._why_not()
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def _why_not(self) -> None:
        """Raise what the server has against this agent: a stream that it ends before the first message does not tell."""
        nothing_but_ids = sync_pb2.GetAuthorizedEntriesRequest(output_mask=entry_pb2.EntryMask())
        await answered(self._upstream.entry.GetAuthorizedEntries(nothing_but_ids, timeout=RPC_TIMEOUT))
        raise Unavailable("the server ended the stream", code="sync_ended")


async def _asked(
    call: Any, request: sync_pb2.SyncAuthorizedEntriesRequest
) -> tuple[list[entry_pb2.Entry], dict[str, Revision]]:
    """Ask on the stream, and read to the end of the answer's pages."""
    await call.write(request)
    entries: list[entry_pb2.Entry] = []
    revisions: dict[str, Revision] = {}
    while True:
        page = await call.read()
        if page is grpc.aio.EOF:
            raise Unavailable("the server ended the stream", code="sync_ended")
        entries += page.entries
        revisions |= {one.id: (one.revision_number, one.created_at) for one in page.entry_revisions}
        if not page.more:
            return entries, revisions
        if max(len(entries), len(revisions)) > MAX_ENTRIES:
            raise Unavailable("the server's answer does not end", code="sync_endless")
