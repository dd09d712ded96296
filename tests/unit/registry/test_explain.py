import json

from broker.registry import match
from broker.registry.explain import explain_json, explain_lines
from tests.unit.registry.estate import NOW, entry, selectors

ENTRIES = [
    entry("ok", "unix:uid:1", spiffe_id="/ok"),
    entry("near", "unix:uid:1", "unix:gid:9", spiffe_id="/near"),
    entry("old", "unix:uid:1", spiffe_id="/old", expires_at=NOW),
]


def test_lines_say_what_was_held_issued_and_missing() -> None:
    lines = explain_lines(match(ENTRIES, selectors("unix:uid:1", "unix:gid:2"), NOW))
    assert lines == [
        "selector    unix:gid:2",
        "selector    unix:uid:1",
        "issued      spiffe://example.org/ok  (entry ok)",
        "refused     spiffe://example.org/old  (entry old)",
        "            the entry expired at 2026-11-22T12:00:00+00:00",
        "refused     spiffe://example.org/near  (entry near)",
        "            missing unix:gid:9",
    ]


def test_lines_say_that_there_was_nothing() -> None:
    lines = explain_lines(match([], frozenset(), NOW))
    assert len(lines) == 2
    assert "without selectors" in lines[0]
    assert "nothing" in lines[1]


def test_json_has_the_same_content() -> None:
    value = explain_json(match(ENTRIES, selectors("unix:uid:1"), NOW))
    assert json.loads(json.dumps(value)) == {
        "kind": "matching_decision",
        "selectors": ["unix:uid:1"],
        "issued": [{"entry_id": "ok", "spiffe_id": "spiffe://example.org/ok"}],
        "refused": [
            {
                "entry_id": "old",
                "spiffe_id": "spiffe://example.org/old",
                "parent_id": "spiffe://example.org/spire/agent/join_token/one",
                "missing": [],
                "expired": True,
            },
            {
                "entry_id": "near",
                "spiffe_id": "spiffe://example.org/near",
                "parent_id": "spiffe://example.org/spire/agent/join_token/one",
                "missing": ["unix:gid:9"],
                "expired": False,
            },
        ],
        "refused_count": 2,
    }


def test_only_the_nearest_refusals_are_shown() -> None:
    decision = match([entry(f"e{n}", f"a:{n}") for n in range(30)], selectors("b:c"), NOW)
    assert explain_lines(decision, max_refused=3)[-1].endswith("27 more that are further away")
    assert len(explain_json(decision, max_refused=3)["refused"]) == 3
    assert explain_json(decision, max_refused=3)["refused_count"] == 30
