"""Texts: every store keeps the same ones, refuses the same ones, and puts them in the same order."""

import asyncio
import hashlib

import pytest

from broker.errors import Conflict, Invalid
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import Change
from broker.spiffe import SpiffeId
from tests.unit.server.store.samples import HOUR, NODE, NOW, entry, node, session

ODD = (
    "",
    " ",
    " trailing ",
    "'; DROP TABLE entries; --",
    '"; SELECT pg_sleep(10); --',
    "$1 $2 ? ?? %s %(x)s {} :name @p",
    "\\ \\x00 \\' E'\\\\'",
    "line\nfeed\r\ttab\x01\x1f\x7f",
    "\u202eright to left\u200b\ufeff",
    "ＴＨＥ ＱＵＩＣＫ ﬃ ı İ ß",
    "👩‍👩‍👧 \U0010ffff",
    "x" * 100_000,
)


@pytest.mark.bears("R12")
class TestTexts:
    @pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
    async def test_what_is_text_comes_back_as_it_was(self, store: Store, odd: str) -> None:
        def keep(w: Writer) -> None:
            w.remember("me", odd[:200], odd, odd, NOW + HOUR)
            w.change("k", odd, odd)

        await store.write(keep)
        assert await store.write(lambda w: w.recall("me", odd[:200], odd)) == odd
        assert await store.read(lambda r: r.changes_since(0, 10)) == (Change(1, "k", odd, odd),)

    @pytest.mark.parametrize("bad", ["a\0b", "\0", "\ud800", "a\udfffb"], ids=["nul inside", "nul", "high", "low"])
    async def test_what_no_store_can_hold_is_refused_and_leaves_nothing(self, store: Store, bad: str) -> None:
        def add(w: Writer) -> None:
            w.change("k", "lost", "")
            w.put_session(session(bad))

        def survive(w: Writer) -> int:
            with pytest.raises(Invalid):
                w.remember("me", bad, "d", "r", NOW + HOUR)
            with pytest.raises(Invalid):
                w.recall("me", bad, "d")
            return w.change("k", "kept", "")

        with pytest.raises(Invalid) as refused:
            await store.write(add)
        assert refused.value.reason == "invalid_text"
        with pytest.raises(Invalid):
            await store.read(lambda r: r.session(bad))
        # The store, and even the act that was refused something, go on.
        assert await store.write(survive) == 1

    async def test_order_and_equality_are_those_of_code_points(self, store: Store) -> None:
        ids = ["A", "B", "Z", "_", "a", "a ", "a-b", "a.b", "aB", "ab", "b", "z", "é", "ﬀ", "😀"]
        await store.write(lambda w: [w.put_session(session(each)) for each in reversed(ids)])
        assert [each.id for each in await store.read(lambda r: r.sessions_of_agent(NODE))] == ids == sorted(ids)

        paths = ["/A", "/a", "/a-b", "/a.b", "/a/b", "/a_b", "/aa"]
        nodes = sorted(SpiffeId(f"spiffe://example.org/spire/agent{path}") for path in paths)
        await store.write(lambda w: [w.put_node(node(id=each)) for each in reversed(nodes)])
        found = [str(each.id) for each in await store.read(lambda r: r.nodes())]
        assert found == sorted(found) == [str(each) for each in nodes]

    async def test_names_that_only_look_alike_are_different(self, store: Store) -> None:
        ids = ["ws", "WS", "ws ", " ws", "w_", "w%", "\u0077\u0301s", "ẃs"]
        await store.write(lambda w: [w.put_session(session(each)) for each in ids])
        for each in ids:
            found = await store.read(lambda r, each=each: r.session(each))
            assert found is not None
            assert found.id == each
        assert await store.read(lambda r: r.session("w")) is None


async def test_a_caught_refusal_of_a_constraint_does_not_spoil_the_act(store: Store) -> None:
    def act(w: Writer) -> int:
        w.add_entry(entry())
        with pytest.raises(Conflict):
            w.add_entry(entry())
        w.add_entry(entry("other"))
        with pytest.raises(Conflict):
            w.replace_entry(entry("other", id="ent_web", revision=1))
        return w.change("k", "x", "")

    assert await store.write(act) == 1
    assert len(await store.read(lambda r: r.entries())) == 2


async def test_a_key_that_is_too_long_for_an_index_is_kept_or_refused_but_never_cut(store: Store) -> None:
    long = "".join(hashlib.sha256(str(n).encode()).hexdigest() for n in range(200))
    other = long[:-1] + "?"
    (outcome,) = await asyncio.gather(store.write(lambda w: w.put_session(session(long))), return_exceptions=True)
    found = await store.read(lambda r: r.session(long))
    if isinstance(outcome, Invalid):
        assert (outcome.reason, found) == ("text_too_long", None)
    else:
        assert (outcome, found and found.id) == (None, long)
    assert await store.read(lambda r: r.session(other)) is None
