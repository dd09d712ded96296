"""A matching decision in words: the entries that were considered, what each lacks, and what is probably to be done.

Responsible for wording and order only; what was decided is in the :class:`~broker.registry.matching.Decision`. How a
selector may be shown is the caller's to say: some hold secrets.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from broker.registry.matching import Considered, Decision
from broker.spiffe import Selector

MAX_REFUSED: Final = 10
"""How many entries that did not match are shown: the nearest ones hold the cause."""
MAX_LACKS: Final = 16
"""How many missing selectors of one entry are shown: an entry that lacks more is about something else."""

ISSUED: Final = "issued"
MISSING: Final = "selectors_missing"
EXPIRED: Final = "entry_expired"
UNVOUCHED: Final = "self_declared_only"

WITHHELD: Final = {
    "names_nodes": "names nodes, not workloads",
    "store_svid": "its SVID is for a store, not for the Workload API",
    "hint_taken": "an older entry has the same hint",
}
"""Reasons, by code, for which an entry that matches is not served; whoever serves it decides."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One entry and the verdict on it, ready to be shown: ``code`` is stable, ``lacks`` are selectors' texts."""

    entry_id: str
    spiffe_id: str
    code: str
    lacks: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_issued(self) -> bool:
        """Tell whether the entry is issued."""
        return self.code == ISSUED


def findings(
    decision: Decision, *, show: Callable[[Selector], str] = str, max_refused: int = MAX_REFUSED
) -> tuple[Finding, ...]:
    """Give the entries that are issued, oldest first, then those that are not, nearest first."""
    issued = tuple(Finding(entry.id, str(entry.spiffe_id), ISSUED) for entry in decision.issued)
    return issued + tuple(_refused(each, show) for each in decision.refused[:max_refused])


def finding_lines(found: Iterable[Finding], label: Callable[[str], str] = str) -> list[str]:
    """Say each verdict in a line; ``label`` may add to the text of a missing selector."""
    rows = [("yes" if one.is_issued else "no", one.entry_id, one.spiffe_id, _verdict(one, label)) for one in found]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, (*widths, 0), strict=True)).rstrip() for row in rows
    ]


def most_likely(found: Sequence[Finding]) -> str:
    """Say what the nearest entry needs, or "" where one is issued."""
    if any(one.is_issued for one in found):
        return ""
    if not found:
        return "no entry names this agent as its parent: broker entry create --parent-id AGENT …"
    # An entry that could never be issued is the cause only where nothing else speaks against it.
    never = {UNVOUCHED, *WITHHELD}
    nearest = next((one for one in found if one.code not in never or not one.lacks), found[0])
    match nearest.code:
        case "entry_expired" if not nearest.lacks:
            return f"entry {nearest.entry_id} is over: broker entry create makes a new one"
        case "self_declared_only":
            return f"give entry {nearest.entry_id} a selector that the kernel or a runtime vouches for"
        case "selectors_missing":
            return (
                f"entry {nearest.entry_id} is the nearest; create one without {', '.join(nearest.lacks)} if it is meant"
            )
        case _:
            return f"entry {nearest.entry_id}: {nearest.note}"


def _refused(each: Considered, show: Callable[[Selector], str]) -> Finding:
    entry = each.entry
    notes: list[str] = []
    codes: list[str] = []
    if each.withheld:
        # First: an entry that is not for workloads is not earned by any selectors, whatever it lacks.
        codes.append(each.withheld)
        notes.append(WITHHELD.get(each.withheld, each.withheld))
    if each.unvouched:
        codes.append(UNVOUCHED)
        notes.append("refused: nobody but the workload vouches for any of its selectors")
    if each.missing:
        codes.append(MISSING)
    if each.expired and entry.expires_at is not None:
        codes.append(EXPIRED)
        notes.append(f"expired {entry.expires_at:%Y-%m-%d %H:%M:%S} UTC")
    lacks = tuple(show(selector) for selector in sorted(each.missing))
    if len(lacks) > MAX_LACKS:
        notes.append(f"and {len(lacks) - MAX_LACKS} more selectors")
    return Finding(entry.id, str(entry.spiffe_id), codes[0], lacks[:MAX_LACKS], "; ".join(notes))


def _verdict(one: Finding, label: Callable[[str], str]) -> str:
    if one.is_issued:
        return "selectors match"
    lacking = f"lacks {' '.join(map(label, one.lacks))}" if one.lacks else "selectors match"
    return ", ".join(filter(None, (lacking, one.note)))
