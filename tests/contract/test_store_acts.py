"""What holds for acts and queries as such: alone, wholly or not at all, durable, one snapshot."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from broker.errors import Refused
from broker.server.store.ports import Store, Writer
from tests.contract.acts import BoomError, Opener, failing
from tests.unit.server.store.samples import (
    NODE,
    entry,
    full_entry,
    node,
    record,
)


class TestActs:
    async def test_a_write_gives_what_the_act_returned_and_a_read_sees_it(self, store: Store) -> None:
        def act(w: Writer) -> str:
            w.put_node(node())
            assert w.node(NODE) == node()
            return "done"

        assert await store.write(act) == "done"
        assert await store.read(lambda r: r.node(NODE)) == node()

    async def test_an_act_that_raises_leaves_nothing_and_the_others_of_its_group_stay(self, store: Store) -> None:
        outcomes = await asyncio.gather(
            store.write(lambda w: w.add_entry(entry("a"))),
            store.write(failing(lambda w: w.add_entry(entry("b")), lambda w: w.change("entry", "b", "{}"))),
            store.write(lambda w: w.add_entry(entry("c"))),
            return_exceptions=True,
        )

        assert [type(outcome) for outcome in outcomes] == [type(None), BoomError, type(None)]
        assert [each.id for each in await store.read(lambda r: r.entries())] == ["ent_a", "ent_c"]
        assert await store.read(lambda r: r.change_head()) == 0

    async def test_acts_run_alone_and_in_the_order_in_which_they_came(self, store: Store) -> None:
        order: list[int] = []
        inside: set[int] = set()

        def act(number: int) -> Callable[[Writer], None]:
            def run(w: Writer) -> None:
                assert not inside
                inside.add(number)
                w.change("n", str(number), "")
                order.append(number)
                inside.remove(number)

            return run

        await asyncio.gather(*(store.write(act(number)) for number in range(300)))

        assert order == list(range(300))

    async def test_a_refusal_of_the_rules_reaches_the_caller_as_it_was_raised(self, store: Store) -> None:
        def act(w: Writer) -> None:
            raise Refused("no", code="task_ended", hint="start a new one")

        with pytest.raises(Refused) as refused:
            await store.write(act)
        assert (refused.value.reason, refused.value.hint) == ("task_ended", "start a new one")

    async def test_even_stop_iteration_is_an_error_of_its_caller_only(self, store: Store) -> None:
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(store.write(lambda _: next(iter(()))), 30)
        assert await store.write(lambda _: 1) == 1

    async def test_a_caller_who_gives_up_does_not_disturb_the_others(self, store: Store) -> None:
        given_up = asyncio.ensure_future(store.write(lambda w: w.change("k", "a", "")))
        kept = asyncio.ensure_future(store.write(lambda w: w.change("k", "b", "")))
        await asyncio.sleep(0)
        given_up.cancel()

        await kept
        assert given_up.cancelled()
        # Unknown to who gave up: the act took place wholly, or not at all.
        changes = await store.read(lambda r: r.changes_since(0, 10))
        assert changes is not None
        assert [c.key for c in changes] in (["b"], ["a", "b"])

    async def test_a_read_sees_one_snapshot_and_never_waits_for_a_write(self, store: Store) -> None:
        entered, go_on = threading.Event(), threading.Event()
        await store.write(lambda w: w.change("k", "1", ""))

        def query(r: object) -> tuple[int, int]:
            before = r.change_head()  # type: ignore[attr-defined]
            entered.set()
            go_on.wait(10)
            return before, r.change_head()  # type: ignore[attr-defined]

        reading = asyncio.ensure_future(store.read(query))
        await asyncio.to_thread(entered.wait, 10)
        await store.write(lambda w: w.change("k", "2", ""))
        go_on.set()

        assert await reading == (1, 1)
        assert await store.read(lambda r: r.change_head()) == 2

    async def test_everything_stays_after_closing_and_opening(self, opener: Opener) -> None:
        async with opener() as first:
            await first.write(lambda w: (w.add_entry(full_entry()), w.change("entry", "x", "{}"), w.record(record())))
            name, head = first.id, first.head
        async with opener() as second:
            assert (second.id, second.head) == (name, head) == (name, 1)
            assert await second.read(lambda r: r.entries()) == (full_entry(),)
            assert await second.write(lambda w: w.change("entry", "y", "{}")) == 2
            assert await second.write(lambda w: w.record(record())) == 2

    async def test_check_is_content_with_a_store_that_works(self, store: Store) -> None:
        await store.check()
