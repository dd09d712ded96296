"""What it takes to make the entries of a server those of a file. Pure: values in, steps out.

An entry of the file is the one with its id, or else the one that says the same: SPIFFE ID, parent and selectors. What the
file does not say of an entry is the default. Only entries of the same owner are ever deleted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeAlias

from broker.cli.entry_values import DEFAULTS, Values
from broker.errors import Conflict, Invalid

_SETS: Final = frozenset({"selectors", "federates_with", "allowed_audiences"})
Key: TypeAlias = tuple[str, str, frozenset[str]]


class Action(StrEnum):
    """What is done with one entry."""

    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Step:
    """One entry: what is done, what it is to be (or was, where it is deleted), and what changes: name to (old, new)."""

    action: Action
    entry: Values
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def plan(
    wanted: Sequence[Values],
    current: Iterable[Values],
    *,
    owner: str = "",
    prune: bool = False,
    take_over: bool = False,
) -> list[Step]:
    """Give the steps, in the order of the file, deletions last; raises Invalid, or Conflict for another owner's entry."""
    if prune and not owner:
        raise Invalid(
            "whose entries may be deleted is not said",
            code="owner_missing",
            hint="add --owner NAME, or owner: in the file",
        )
    there = list(current)
    by_id = {entry["id"]: entry for entry in there}
    by_key = {_key(entry): entry for entry in there}
    steps: list[Step] = []
    used: set[str] = set()
    for one in map(_complete(owner), _unique(wanted)):
        known = by_id.get(one["id"]) or by_key.get(_key(one))
        if known is None:
            steps.append(Step(Action.CREATE, one))
            continue
        if known["id"] in used:
            raise Invalid(f"the file has the entry {known['id']} twice", code="invalid_entry_file")
        used.add(known["id"])
        steps.append(_change(known, one, owner, take_over=take_over))
    if prune:
        steps += [Step(Action.DELETE, entry) for entry in there if entry["owner"] == owner and entry["id"] not in used]
    return steps


def _change(known: Values, wanted: Values, owner: str, *, take_over: bool) -> Step:
    if owner and known["owner"] not in {"", owner} and not take_over:
        raise Conflict(
            f"the entry {known['id']} belongs to {known['owner']}",
            code="other_owner",
            hint="leave it out of the file, or add --take-over",
        )
    names = {"spiffe_id", "parent_id", *DEFAULTS}
    if not wanted["owner"]:
        names.discard("owner")  # nobody claims it: it stays whose it is
    changes = {
        name: (known[name], wanted[name]) for name in sorted(names) if not _is_same(name, known[name], wanted[name])
    }
    kept = {**wanted, "id": known["id"], "owner": wanted["owner"] or known["owner"]}
    return Step(Action.UPDATE if changes else Action.UNCHANGED, kept, changes)


def _is_same(name: str, old: Any, new: Any) -> bool:
    if name in _SETS:
        return set(old) == set(new)
    if name == "dns_names":
        return [one.lower() for one in old] == [one.lower() for one in new]
    return bool(old == new)


def _complete(owner: str) -> Any:
    return lambda entry: {"id": "", **DEFAULTS, **entry, "owner": entry.get("owner") or owner}


def _unique(wanted: Sequence[Values]) -> Sequence[Values]:
    keys = [_key(one) for one in wanted]
    ids = [one["id"] for one in wanted if one.get("id")]
    if len(set(keys)) != len(keys) or len(set(ids)) != len(ids):
        raise Invalid(
            "the file has an entry twice",
            code="invalid_entry_file",
            hint="an entry is unique by SPIFFE ID, parent and selectors, and by its id",
        )
    return wanted


def _key(entry: Values) -> Key:
    return entry["spiffe_id"], entry["parent_id"], frozenset(entry["selectors"])
