"""A tree of tasks as it is shown: the state that counts is the one that the server judges by."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from broker.cli.task_tree import LIVE, branch_of, lines
from broker.errors import NotFound
from broker.tasks import Cause, State, Task, effective_state, lineage_state
from tests.unit.tasks.test_lineage import family
from tests.unit.tasks.world import NOW


def wire(task_id: str, parent: str = "", depth: int = 0, *, state: str = "active", at: int = 0) -> Any:
    return SimpleNamespace(id=task_id, parent=parent, depth=depth, state=state, created_at=at)


def test_each_stands_right_below_its_parent_in_the_order_of_their_start() -> None:
    tasks = [wire("c", "b", 2), wire("d", "a", 1, at=2), wire("b", "a", 1, at=1), wire("e", "d", 2), wire("a")]
    drawn = [prefix + branch.task.id for branch, prefix in lines(branch_of(tasks, "a"))]
    assert drawn == ["a", "├─ b", "│  └─ c", "└─ d", "   └─ e"]
    assert [branch.task.id for branch, _ in lines(branch_of(tasks, "d"))] == ["d", "e"]


def test_what_is_over_is_left_out_with_all_below_it() -> None:
    tasks = [wire("a"), wire("b", "a", 1, state="revoked"), wire("c", "b", 2), wire("d", "a", 1)]
    assert [prefix + branch.task.id for branch, prefix in lines(branch_of(tasks, "a"), live=True)] == ["a", "└─ d"]
    assert list(lines(branch_of(tasks, "b"), live=True)) == []


def test_an_unknown_task() -> None:
    with pytest.raises(NotFound):
        branch_of([wire("a")], "b")


def in_state(task: Task, state: State) -> Task:
    if not state.is_terminal:
        return replace(task, state=state)
    return replace(task, state=state, cause=Cause.OPERATOR, ended_at=NOW)


def test_the_state_is_the_one_that_the_server_judges_by() -> None:
    """Every combination of states along a chain of three."""
    assert {state for state in State if not state.is_terminal} == LIVE
    for states in itertools.product(State, repeat=3):
        # Deepest first.
        line = [in_state(each, state) for each, state in zip(family(3), states, strict=True)]
        told = [wire(each.id, each.parent or "", each.depth, state=effective_state(each, NOW).value) for each in line]
        shown = {branch.task.id: branch.state for branch, _ in lines(branch_of(told, line[-1].id))}
        for place, each in enumerate(line):
            assert shown[each.id] == lineage_state(each, line[place + 1 :], NOW).value, states
