"""The change log and the audit chain."""

import asyncio
import threading
from collections.abc import Sequence

from broker.audit.chain import GENESIS
from broker.audit.verify import verify_chain
from broker.server.store.ports import Store
from broker.server.store.rows import Change
from tests.contract.acts import BoomError, failing
from tests.unit.server.store.samples import (
    record,
)


class TestChanges:
    async def test_they_are_numbered_without_gaps_and_told_in_order_before_the_write_returns(
        self, store: Store
    ) -> None:
        told: list[Change] = []
        threads: set[int] = set()

        def hear(changes: Sequence[Change]) -> None:
            told.extend(changes)
            threads.add(threading.get_ident())

        store.subscribe(hear)

        async def write(number: int) -> None:
            act = (
                failing(lambda w: w.change("k", "no", "")) if number % 3 == 0 else lambda w: w.change("k", "yes", "{}")
            )
            try:
                seq = await store.write(act)
            except BoomError:
                return
            assert store.head >= seq
            assert any(change.seq == seq for change in told)

        await asyncio.gather(*(write(number) for number in range(200)))

        assert [change.seq for change in told] == list(range(1, len(told) + 1))
        assert {change.key for change in told} == {"yes"}
        assert await store.read(lambda r: r.changes_since(0, 1000)) == tuple(told)
        assert store.head == len(told)
        assert threads == {threading.get_ident()}

    async def test_a_subscription_ends(self, store: Store) -> None:
        told: list[Change] = []
        end = store.subscribe(told.extend)
        end()
        end()
        await store.write(lambda w: w.change("k", "a", ""))
        assert told == []

    async def test_a_subscriber_that_fails_does_not_reach_the_writer_or_the_others(self, store: Store) -> None:
        reported: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        told: list[Change] = []

        def fail(_: Sequence[Change]) -> None:
            raise BoomError

        store.subscribe(fail)
        store.subscribe(told.extend)

        assert await store.write(lambda w: w.change("k", "a", "")) == 1
        assert len(told) == 1
        assert isinstance(reported[0], BoomError)

    async def test_a_cursor_is_resumed_or_refused(self, store: Store) -> None:
        assert await store.read(lambda r: r.changes_since(0, 10)) == ()
        await store.write(lambda w: [w.change("k", str(n), "") for n in range(5)])

        page = await store.read(lambda r: r.changes_since(2, 2))
        assert page is not None
        assert [change.seq for change in page] == [3, 4]
        assert await store.read(lambda r: r.changes_since(5, 10)) == ()
        # A number that we never gave is another history's: a restored backup must not be resumed.
        assert await store.read(lambda r: r.changes_since(6, 10)) is None
        assert await store.read(lambda r: r.changes_since(-1, 10)) is None


class TestAudit:
    async def test_the_chain_holds_whatever_failed_in_between(self, store: Store) -> None:
        acts = [
            failing(lambda w: w.record(record("lost"))) if number % 4 == 1 else lambda w: w.record(record("kept"))
            for number in range(100)
        ]
        await asyncio.gather(*(store.write(act) for act in acts), return_exceptions=True)

        rows = await store.read(lambda r: r.records(0, 1000))
        head = await store.read(lambda r: r.chain_head())
        assert verify_chain(rows, expect=head) == head
        assert head.seq == len(rows) == 75
        assert not any(b"lost" in row.body for row in rows)

    async def test_it_starts_empty_and_is_read_in_pages(self, store: Store) -> None:
        assert await store.read(lambda r: r.chain_head()) == GENESIS
        await store.write(lambda w: [w.record(record(f"s{n}")) for n in range(5)])
        assert [row.seq for row in await store.read(lambda r: r.records(2, 2))] == [3, 4]
