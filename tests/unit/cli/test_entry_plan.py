"""Which steps make a server's entries those of a file."""

import pytest

from broker.cli.entry_plan import Action, plan
from broker.cli.entry_values import DEFAULTS, Values
from broker.errors import Conflict, Invalid

NODE = "spiffe://a.test/node"


def wanted(path: str, **members: object) -> Values:
    return {"spiffe_id": f"spiffe://a.test{path}", "parent_id": NODE, "selectors": ["unix:uid:0"], **members}


def known(entry_id: str, path: str, **members: object) -> Values:
    return {"id": entry_id, **DEFAULTS, **wanted(path), "revision_number": 3, "created_at": 1, **members}


def actions(*given: object, **options: object) -> list[tuple[Action, str]]:
    return [(step.action, step.entry["id"]) for step in plan(*given, **options)]  # type: ignore[arg-type]


def test_what_is_missing_is_created_and_what_is_there_stays() -> None:
    assert actions([wanted("/new"), wanted("/old")], [known("1", "/old"), known("2", "/other")]) == [
        (Action.CREATE, ""),
        (Action.UNCHANGED, "1"),
    ]


def test_what_differs_is_changed_and_the_difference_is_told() -> None:
    (step,) = plan([wanted("/a", hint="new", selectors=["unix:uid:0"])], [known("1", "/a", hint="old", admin=True)])
    assert step.action is Action.UPDATE
    # What the file does not say is the default: an admin that it does not name is none.
    assert step.changes == {"hint": ("old", "new"), "admin": (True, False)}
    assert step.entry["id"] == "1"


def test_sets_have_no_order_and_dns_names_no_case() -> None:
    two = ["unix:uid:0", "unix:gid:0"]
    here = known("1", "/a", selectors=two[::-1], dns_names=["a", "b"], allowed_audiences=["x", "y"])
    same = wanted("/a", selectors=two, dns_names=["A", "b"], allowed_audiences=["y", "x"])
    assert actions([same], [here]) == [(Action.UNCHANGED, "1")]
    assert actions([{**same, "dns_names": ["b", "a"]}], [here]) == [(Action.UPDATE, "1")]


def test_an_id_finds_an_entry_whose_identity_changes() -> None:
    (step,) = plan([wanted("/new", id="1")], [known("1", "/old")])
    assert step.action is Action.UPDATE
    assert set(step.changes) == {"spiffe_id"}


def test_an_entry_of_another_id_that_says_the_same_is_that_entry() -> None:
    assert actions([wanted("/a", id="theirs")], [known("ours", "/a")]) == [(Action.UNCHANGED, "ours")]


def test_only_the_owner_s_entries_are_deleted() -> None:
    current = [
        known("1", "/a", owner="me"),
        known("2", "/b", owner="me"),
        known("3", "/c", owner="you"),
        known("4", "/d"),
    ]
    assert actions([wanted("/a")], current, owner="me", prune=True) == [(Action.UNCHANGED, "1"), (Action.DELETE, "2")]
    assert actions([wanted("/a")], current, owner="me") == [(Action.UNCHANGED, "1")]
    with pytest.raises(Invalid) as refused:
        plan([wanted("/a")], current, prune=True)
    assert refused.value.reason == "owner_missing"


def test_entries_of_nobody_are_taken_and_those_of_others_are_not() -> None:
    (step,) = plan([wanted("/d")], [known("4", "/d")], owner="me")
    assert (step.action, step.changes) == (Action.UPDATE, {"owner": ("", "me")})
    with pytest.raises(Conflict):
        plan([wanted("/c")], [known("3", "/c", owner="you")], owner="me")
    (step,) = plan([wanted("/c")], [known("3", "/c", owner="you")], owner="me", take_over=True)
    assert step.entry["owner"] == "me"
    # A file of nobody leaves the owner.
    (step,) = plan([wanted("/c", hint="h")], [known("3", "/c", owner="you")])
    assert step.entry["owner"] == "you"
    assert set(step.changes) == {"hint"}


@pytest.mark.parametrize(
    "twice", [[wanted("/a"), wanted("/a", hint="h")], [wanted("/a", id="1"), wanted("/b", id="1")]]
)
def test_an_entry_twice_is_refused(twice: list[Values]) -> None:
    with pytest.raises(Invalid):
        plan(twice, [])
    # Two of the file that are one of the server: by its id, and by what it says.
    with pytest.raises(Invalid):
        plan([wanted("/b", id="1"), wanted("/a")], [known("1", "/a")])
