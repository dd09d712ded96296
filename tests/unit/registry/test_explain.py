"""The wording of a decision: order, what is lacking, and what is probably to be done."""

from dataclasses import replace

from broker.registry import Decision, match
from broker.registry.explain import MAX_LACKS, Finding, finding_lines, findings, most_likely
from broker.spiffe import Selector
from tests.unit.registry.estate import NOW, entry, selectors

ENTRIES = [
    entry("ok", "unix:uid:1", spiffe_id="/ok"),
    entry("near", "unix:uid:1", "unix:gid:9", spiffe_id="/near"),
    entry("old", "unix:uid:1", spiffe_id="/old", expires_at=NOW),
]


def test_issued_first_then_the_nearest() -> None:
    found = findings(match(ENTRIES, selectors("unix:uid:1", "unix:gid:2"), NOW))
    assert found == (
        Finding("ok", "spiffe://example.org/ok", "issued"),
        Finding("old", "spiffe://example.org/old", "entry_expired", (), "expired 2026-11-22 12:00:00 UTC"),
        Finding("near", "spiffe://example.org/near", "selectors_missing", ("unix:gid:9",)),
    )
    assert finding_lines(found) == [
        "yes  ok    spiffe://example.org/ok    selectors match",
        "no   old   spiffe://example.org/old   selectors match, expired 2026-11-22 12:00:00 UTC",
        "no   near  spiffe://example.org/near  lacks unix:gid:9",
    ]
    assert most_likely(found) == ""
    assert finding_lines(found, str.upper)[-1].endswith("lacks UNIX:GID:9")


def test_what_is_likely() -> None:
    def likely(*texts: str, entries=ENTRIES[1:]) -> str:
        return most_likely(findings(match(entries, selectors(*texts), NOW)))

    assert "entry old is over" in likely("unix:uid:1")
    assert "entry near is the nearest" in likely("unix:gid:8", entries=ENTRIES[1:2])
    assert "no entry names this agent" in likely("unix:uid:1", entries=[])


def test_selectors_are_shown_as_the_caller_says() -> None:
    found = findings(match(ENTRIES[1:2], selectors("a:b"), NOW), show=lambda one: f"{one.type}:…")
    assert found[0].lacks == ("unix:…", "unix:…")


def test_an_entry_of_self_declared_selectors_alone() -> None:
    def vouched(selector: Selector) -> bool:
        return selector.type == "unix"

    weak = entry("weak", "env:A", "env:B")
    decision = match([weak, entry("strong", "env:A", "unix:uid:1")], selectors("env:A", "env:B"), NOW, vouched)
    assert decision.issued == ()
    found = findings(decision)
    assert [(one.entry_id, one.code) for one in found] == [
        ("weak", "self_declared_only"),
        ("strong", "selectors_missing"),
    ]
    assert "nobody but the workload vouches" in finding_lines(found)[0]
    assert "vouches" in most_likely(found)


def test_only_the_nearest_and_only_so_many() -> None:
    decision = match([entry(f"e{n}", f"a:{n}") for n in range(30)], selectors("b:c"), NOW)
    assert len(findings(decision, max_refused=3)) == 3
    (many,) = findings(match([entry("e", *(f"a:{n}" for n in range(MAX_LACKS + 2)))], selectors("b:c"), NOW))
    assert (len(many.lacks), many.note) == (MAX_LACKS, "and 2 more selectors")


def test_an_entry_that_is_not_for_workloads_is_no_advice_whatever_it_lacks() -> None:
    nodes, meant = entry("nodes", "unix:uid:7", spiffe_id="/nodes"), entry("meant", "unix:uid:8", "unix:gid:9")
    decision = match([nodes, meant], selectors("unix:uid:1"), NOW)
    considered = tuple(
        replace(each, withheld="names_nodes" if each.entry is nodes else "") for each in decision.considered
    )
    found = findings(Decision(decision.selectors, (), considered))
    assert (found[0].entry_id, found[0].code, found[0].lacks) == ("nodes", "names_nodes", ("unix:uid:7",))
    assert "entry meant is the nearest" in most_likely(found)
    # Alone, because somebody asked for it by its id: what it is, and nothing to create.
    assert most_likely(found[:1]) == "entry nodes: names nodes, not workloads"
