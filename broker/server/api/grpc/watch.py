"""``broker.server.v1.Watch``: the stream that tells an agent its entries and bundles."""

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Final

from broker._proto.broker.server.v1 import watch_pb2
from broker._proto.service import Context, ServiceBinding
from broker.server.api.access import Caller, agent_of
from broker.server.api.grpc.convert import bundle_message, registered_entry_message
from broker.server.api.grpc.paging import MAX_PAGE_BYTES, pages
from broker.server.identity.nodes import Nodes
from broker.server.identity.watch import Delta, Heartbeat, Snapshot, Update
from broker.server.identity.watch import Watch as WatchCases

BINDING: Final = ServiceBinding.of(watch_pb2.DESCRIPTOR, "Watch")


class Watch:
    """The service, over its use cases."""

    def __init__(self, watch: WatchCases, nodes: Nodes, store_id: str) -> None:
        self._watch = watch
        self._nodes = nodes
        self._store_id = store_id

    async def Watch(  # noqa: N802  # the name on the wire
        self, request: watch_pb2.WatchRequest, context: Context, caller: Caller
    ) -> AsyncIterator[watch_pb2.WatchResponse]:
        """A snapshot or what was missed, then everything as it happens, until the agent is refused."""
        svid, told = agent_of(caller), request.cursor
        async with aclosing(self._watch.follow(svid.id, request.cursor, request.store)) as updates:
            async for update in updates:
                # NOTE(security): the stream is older than the ban, the eviction or the newer certificate.
                self._nodes.require_active(svid)
                for message in cut(self._message(update), told):
                    yield message
                told = update.seq

    def _message(self, update: Update) -> watch_pb2.WatchResponse:
        message = watch_pb2.WatchResponse(seq=update.seq, store=self._store_id)
        match update:
            case Snapshot():
                message.snapshot.CopyFrom(
                    watch_pb2.WatchSnapshot(
                        entries=map(registered_entry_message, update.entries),
                        bundles=map(bundle_message, update.bundles),
                        more=update.more,
                        crls=watch_pb2.CrlSet(crls=update.crls) if update.crls is not None else None,
                    )
                )
            case Delta():
                message.delta.CopyFrom(
                    watch_pb2.WatchDelta(
                        upserted=map(registered_entry_message, update.upserted),
                        deleted_ids=update.deleted_ids,
                        bundles=map(bundle_message, update.bundles),
                        deleted_bundles=[name.name for name in update.deleted_bundles],
                        crls=watch_pb2.CrlSet(crls=update.crls) if update.crls is not None else None,
                    )
                )
            case Heartbeat():
                message.heartbeat.CopyFrom(watch_pb2.WatchHeartbeat())
        return message


def cut(message: watch_pb2.WatchResponse, told: int) -> Iterator[watch_pb2.WatchResponse]:
    """Cut a message that gRPC would not let pass into some that it does. ``told``: the number before it.

    The number moves with the last one only: a stream that breaks in between is resumed from before all of them.
    """
    if message.ByteSize() <= MAX_PAGE_BYTES:
        yield message
        return
    is_snapshot = message.WhichOneof("kind") == "snapshot"
    entries = list(message.snapshot.entries if is_snapshot else message.delta.upserted)
    rest = watch_pb2.WatchResponse()
    rest.CopyFrom(message)
    if is_snapshot:
        rest.snapshot.ClearField("entries")
    else:
        rest.delta.ClearField("upserted")
    for page, more in pages(entries, len(entries)):
        if is_snapshot:
            rest.snapshot.entries.extend(page)
            rest.snapshot.more = more or message.snapshot.more
        else:
            rest.delta.upserted.extend(page)
            rest.seq = told if more else message.seq
        yield rest
        rest = watch_pb2.WatchResponse(seq=message.seq, store=message.store)
        (rest.snapshot if is_snapshot else rest.delta).SetInParent()
