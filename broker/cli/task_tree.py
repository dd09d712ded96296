"""A tree of tasks as it is shown: each task right below its parent, with the state that counts. Asks nobody."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from broker.errors import NotFound

LIVE: Final = frozenset({"pending", "active", "suspended"})
"""The states of a task that is not over."""


@dataclass(slots=True)
class Branch:
    """A task (``broker.server.v1.Task``), its state with what stands above it taken into account, and what is below it."""

    task: Any
    state: str
    below: list["Branch"] = field(default_factory=list)


def branch_of(tasks: Sequence[Any], top: str) -> Branch:
    """Give the task ``top`` with all below it; ``tasks`` is its whole tree, with each one's own state, in any order.

    Raises:
        NotFound: it is not among them.
    """
    made = {task.id: Branch(task, task.state) for task in tasks}
    if top not in made:
        raise NotFound("no such task", code="task_unknown")
    # The same order at every look; those above come before what is below them.
    for each in sorted(made.values(), key=lambda each: (each.task.depth, each.task.created_at, each.task.id)):
        above = made.get(each.task.parent)
        if above is not None:
            above.below.append(each)
            each.state = _under(above.state, each.state)
    return made[top]


def _under(above: str, own: str) -> str:
    """Give the state that counts, as the server judges it: what is below an end is over, below a suspension it stands still."""
    if own not in LIVE:
        return own
    if above not in LIVE:
        return "cascaded"
    return own if above == "active" else "suspended"


def lines(branch: Branch, *, live: bool = False) -> Iterator[tuple[Branch, str]]:
    """Give each task and how its place is drawn, from the top down; ``live`` leaves out what is over."""
    if not live or branch.state in LIVE:
        yield branch, ""
        yield from _lines_below(branch, "", live=live)


def _lines_below(branch: Branch, indent: str, *, live: bool) -> Iterator[tuple[Branch, str]]:
    shown = [each for each in branch.below if not live or each.state in LIVE]
    for number, each in enumerate(shown, 1):
        last = number == len(shown)
        yield each, indent + ("└─ " if last else "├─ ")
        yield from _lines_below(each, indent + ("   " if last else "│  "), live=live)
