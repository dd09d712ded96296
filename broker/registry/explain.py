"""A matching decision in words: for people as lines, for programs as JSON values.

Responsible for wording and order only; what was decided is in the :class:`~broker.registry.matching.Decision`.
"""

from typing import Final

from broker.registry.matching import Considered, Decision
from broker.spiffe.strictjson import JsonValue

MAX_REFUSED: Final = 20
"""How many entries that did not match are shown: the nearest ones hold the cause."""


def explain_lines(decision: Decision, *, max_refused: int = MAX_REFUSED) -> list[str]:
    """Say what was decided and why, one fact a line; refused entries nearest first."""
    lines = [f"selector    {selector}" for selector in sorted(decision.selectors)]
    if not decision.selectors:
        lines.append("selectors   none: a caller without selectors matches nothing")
    lines += [f"issued      {entry.spiffe_id}  (entry {entry.id})" for entry in decision.issued]
    if not decision.issued:
        lines.append("issued      nothing: no entry has all of its selectors among these")
    refused = decision.refused
    for each in refused[:max_refused]:
        lines.append(f"refused     {each.entry.spiffe_id}  (entry {each.entry.id})")
        lines += [f"            {reason}" for reason in _reasons(each)]
    if len(refused) > max_refused:
        lines.append(f"            and {len(refused) - max_refused} more that are further away")
    return lines


def explain_json(decision: Decision, *, max_refused: int = MAX_REFUSED) -> dict[str, JsonValue]:
    """Give the decision as JSON values, with the same content and order as the lines."""
    refused = decision.refused
    return {
        "kind": "matching_decision",
        "selectors": [str(selector) for selector in sorted(decision.selectors)],
        "issued": [{"entry_id": entry.id, "spiffe_id": str(entry.spiffe_id)} for entry in decision.issued],
        "refused": [_refused_json(each) for each in refused[:max_refused]],
        "refused_count": len(refused),
    }


def _reasons(each: Considered) -> list[str]:
    reasons = [f"missing {selector}" for selector in sorted(each.missing)]
    if each.expired and each.entry.expires_at is not None:
        reasons.append(f"the entry expired at {each.entry.expires_at.isoformat()}")
    return reasons


def _refused_json(each: Considered) -> dict[str, JsonValue]:
    return {
        "entry_id": each.entry.id,
        "spiffe_id": str(each.entry.spiffe_id),
        "parent_id": str(each.entry.parent_id),
        "missing": [str(selector) for selector in sorted(each.missing)],
        "expired": each.expired,
    }
