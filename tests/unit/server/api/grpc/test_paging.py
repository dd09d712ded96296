from broker._proto.broker.server.v1 import entries_pb2, watch_pb2
from broker._proto.spire.api.types import entry_pb2
from broker.server.api.grpc.paging import MAX_PAGE_BYTES, pages
from broker.server.api.grpc.watch import cut


def entries(count, size=0):
    return [entries_pb2.RegisteredEntry(entry=entry_pb2.Entry(id=str(n)), description="x" * size) for n in range(count)]


def shape(found):
    return [(len(page), more) for page, more in found]


def test_pages_are_cut_by_number():
    assert shape(pages(entries(0), 5)) == [(0, False)]
    assert shape(pages(entries(5), 5)) == [(5, False)]
    assert shape(pages(entries(11), 5)) == [(5, True), (5, True), (1, False)]


def test_pages_are_cut_by_bytes():
    large = entries(10, MAX_PAGE_BYTES // 4)
    cut_up = list(pages(large, 500))
    assert shape(cut_up) == [(3, True), (3, True), (3, True), (1, False)]
    assert [one for page, _ in cut_up for one in page] == large
    # One that is larger than a page stands alone.
    assert shape(pages(entries(2, MAX_PAGE_BYTES + 1), 500)) == [(1, True), (1, False)]


def test_a_message_that_fits_is_left_alone():
    message = watch_pb2.WatchResponse(seq=7, store="s", delta=watch_pb2.WatchDelta(deleted_ids=["a"]))
    assert list(cut(message, 3)) == [message]


def test_a_large_delta_moves_the_cursor_with_its_last_part_only():
    upserted = entries(10, MAX_PAGE_BYTES // 4)
    delta = watch_pb2.WatchDelta(upserted=upserted, deleted_ids=["gone"])
    parts = list(cut(watch_pb2.WatchResponse(seq=7, store="s", delta=delta), 3))
    assert [(part.seq, part.store) for part in parts] == [(3, "s")] * 3 + [(7, "s")]
    assert [one for part in parts for one in part.delta.upserted] == upserted
    assert [list(part.delta.deleted_ids) for part in parts] == [["gone"], [], [], []]


def test_a_large_page_of_a_snapshot_says_that_more_follows():
    listed = entries(10, MAX_PAGE_BYTES // 4)
    for more in (True, False):
        snapshot = watch_pb2.WatchSnapshot(entries=listed, more=more)
        parts = list(cut(watch_pb2.WatchResponse(seq=7, store="s", snapshot=snapshot), 3))
        assert [part.snapshot.more for part in parts] == [True, True, True, more]
        assert [one for part in parts for one in part.snapshot.entries] == listed
        assert {part.seq for part in parts} == {7}
