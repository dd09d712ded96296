import time
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import NoIdentity
from broker.registry import Entry, EntryIndex, match, oldest_of_each_hint
from broker.spiffe import Selector
from tests.unit.registry.estate import NOW, entry, selectors

SOME_SELECTORS = st.frozensets(st.sampled_from([f"k:{n}" for n in range(6)]), min_size=1, max_size=4)
ENTRIES = st.lists(
    st.builds(
        lambda number, needs, age, expires: entry(
            f"e{number}",
            *needs,
            created_at=NOW - timedelta(seconds=age),
            expires_at=None if expires is None else NOW + timedelta(seconds=expires),
        ),
        st.integers(0, 15),
        SOME_SELECTORS,
        st.integers(0, 3),
        st.sampled_from([None, -1, 0, 1]),
    ),
    max_size=30,
)


def naive(entries: list[Entry], held: frozenset[Selector]) -> list[str]:
    by_id = {each.id: each for each in entries}
    return [
        each.id
        for each in sorted(by_id.values(), key=lambda each: (each.created_at, each.id))
        if all(need in held for need in each.selectors) and (each.expires_at is None or each.expires_at > NOW)
    ]


def test_all_of_an_entrys_selectors_are_needed() -> None:
    entries = [entry("both", "unix:uid:1", "unix:gid:2"), entry("one", "unix:uid:1"), entry("other", "unix:uid:2")]
    decision = match(entries, selectors("unix:uid:1", "unix:gid:3"), NOW)
    assert [each.id for each in decision.issued] == ["one"]
    assert {each.entry.id: each.missing for each in decision.refused} == {
        "both": selectors("unix:gid:2"),
        "other": selectors("unix:uid:2"),
    }


def by_the_kernel(selector: Selector) -> bool:
    return selector.type == "unix"


def test_an_entry_that_only_the_workload_vouches_for_is_not_earned_by_its_word() -> None:
    entries = [entry("weak", "env:A"), entry("strong", "env:A", "unix:uid:1")]
    held = selectors("env:A", "unix:uid:1")
    index = EntryIndex(entries, vouched=by_the_kernel)
    for issued in (match(entries, held, NOW, by_the_kernel).issued, index.match(held, NOW)):
        assert [each.id for each in issued] == ["strong"]
    # One whom the operator trusts for it may stand for them.
    assert {each.id for each in index.match(held, NOW, are_vouched=True)} == {"weak", "strong"}
    # What is changed under its id is judged anew.
    index.add(entry("weak", "env:A", "unix:uid:1", spiffe_id="/other"))
    assert {each.id for each in index.match(held, NOW)} == {"weak", "strong"}
    index.add(entry("strong", "env:A"))
    assert [each.id for each in index.match(held, NOW)] == ["weak"]


@pytest.mark.bears("A17")
@pytest.mark.parametrize("held", [(), ("unix:uid:10",), ("unix:uid:1000 ",), ("unix:UID:1000",), ("unixx:uid:1000",)])
def test_nothing_like_a_selector_is_that_selector(held: tuple[str, ...]) -> None:
    decision = match([entry("one", "unix:uid:1000")], selectors(*held), NOW)
    assert decision.issued == ()
    with pytest.raises(NoIdentity, match=r"^no identity issued$"):
        decision.require()


def test_an_expired_entry_says_so() -> None:
    decision = match([entry("old", "a:b", expires_at=NOW)], selectors("a:b"), NOW)
    assert decision.issued == ()
    assert [(each.expired, each.missing) for each in decision.refused] == [(True, frozenset())]


def test_the_nearest_refusal_comes_first() -> None:
    entries = [entry("far", "a:1", "a:2", "a:3"), entry("near", "a:1", "a:9"), entry("mid", "a:8", "a:9")]
    decision = match(entries, selectors("a:1"), NOW)
    assert [each.entry.id for each in decision.refused] == ["near", "far", "mid"]


@pytest.mark.bears("WA-13", "W05")
def test_of_one_hint_the_oldest_entry_stays() -> None:
    entries = [
        entry("young", hint="a", created_at=NOW),
        entry("old", hint="a", created_at=NOW - timedelta(days=2)),
        entry("none-1", created_at=NOW),
        entry("none-2", created_at=NOW),
        entry("other", hint="b", created_at=NOW),
    ]
    assert [each.id for each in oldest_of_each_hint(entries)] == ["old", "none-1", "none-2", "other"]


@given(ENTRIES, SOME_SELECTORS)
def test_the_index_gives_what_the_definition_gives(entries: list[Entry], held: frozenset[str]) -> None:
    caller = selectors(*held)
    index = EntryIndex(entries)
    expected = naive(entries, caller)
    assert [each.id for each in index.match(caller, NOW)] == expected
    assert [each.id for each in match(index, caller, NOW).issued] == expected
    assert index.match(caller, NOW) == index.explain(caller, NOW).issued
    assert index.match(frozenset(), NOW) == ()


@given(ENTRIES, st.lists(st.integers(0, 15)), ENTRIES, SOME_SELECTORS)
def test_the_index_forgets_what_is_removed(
    before: list[Entry], gone: list[int], after: list[Entry], held: frozenset[str]
) -> None:
    index = EntryIndex(before)
    kept = {each.id: each for each in before}
    for number in gone:
        assert index.remove(f"e{number}") == kept.pop(f"e{number}", None)
    for each in after:
        assert index.add(each) == kept.get(each.id)
        kept[each.id] = each
    assert {each.id: each for each in index} == kept
    assert len(index) == len(kept)
    assert [each.id for each in index.match(selectors(*held), NOW)] == naive(list(kept.values()), selectors(*held))
    for entry_id in list(kept):
        assert entry_id in index
        assert index.get(entry_id) == kept[entry_id]
        index.remove(entry_id)
    # Nothing stays behind, or a long life of changes would fill the memory.
    assert (len(index), index._by_selector, index._frequency) == (0, {}, {})


def test_an_index_looks_at_few_entries() -> None:
    index = EntryIndex(
        entry(f"e{n}", "k8s:ns:prod", f"k8s:sa:s{n % 100}", f"k8s:pod-label:app:a{n}") for n in range(2_000)
    )
    looked_at = sum(
        len(index._by_selector.get(text, ()))
        for text in ("k8s:ns:prod", "k8s:sa:s7", "k8s:pod-label:app:a107", "unix:uid:0")
    )
    assert looked_at < 10
    held = selectors("k8s:ns:prod", "k8s:sa:s7", "k8s:pod-label:app:a107", "unix:uid:0")
    assert [each.id for each in index.match(held, NOW)] == ["e107"]


def test_a_change_costs_the_same_in_a_large_index() -> None:
    changed = entry("e7", "k8s:ns:prod", "k8s:sa:other")

    def quickest(count: int) -> float:
        index = EntryIndex(entry(f"e{n}", "k8s:ns:prod", f"k8s:sa:s{n}") for n in range(count))
        took = []
        for _ in range(100):
            began = time.thread_time()
            index.add(changed)
            took.append(time.thread_time() - began)
        return min(took)  # of the others some had the collector or another program in them

    # Of two hundred times as many entries; the clock may not be finer than some microseconds.
    assert quickest(20_000) < 20 * quickest(100) + 0.0001
