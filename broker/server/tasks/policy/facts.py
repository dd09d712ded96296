"""A question as the engine reads it: its context and its entities, as the schema has them. Pure, and without the engine."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from broker.server.tasks.policy.asked import ApprovalAsked, Question, families_of, paths_above, places_above


def circumstances(asked: Question, reads: frozenset[str], literals: frozenset[str]) -> dict[str, Any]:
    """Give the context of a question, as the schema has it, without what nothing reads."""
    context: dict[str, Any] = {}
    if "user" in reads:
        context["user"] = _reference("User", asked.user)
    if "agent" in reads and isinstance(asked, ApprovalAsked):
        context["agent"] = _reference("Agent", str(asked.agent))
    if "actions" in reads:
        context["actions"] = sorted(asked.actions | _meant(asked.actions, literals))
    if "families" in reads:
        context["families"] = sorted({family for name in asked.actions for family in families_of(name)})
    if "identified" in reads:
        context["identified"] = asked.identified
    if "acr" in reads and asked.acr is not None:
        context["acr"] = asked.acr
    if "auth_age" in reads and asked.auth_age is not None:
        context["auth_age"] = asked.auth_age
    if "hop" in reads:
        context["hop"] = asked.hop
    if "supervision" in reads:
        context["supervision"] = _reference("Supervision", asked.supervision)
    return context


def entities_of(asked: Question) -> Iterator[dict[str, Any]]:
    """Give the entities of a question: agent and audience with all that they lie below, at segment boundaries; users and action."""
    yield from _chain("Agent", "AgentPath", paths_above(asked.agent))
    risk = {"risk": _reference("Risk", asked.risk)}
    yield from _chain("Audience", "Location", places_above(asked.audience), risk)
    for user, issuer in asked.users:
        yield {"uid": uid("User", user), "attrs": {}, "parents": [uid("Issuer", issuer)]}
    group = asked.action.group
    parents = [] if group is None else [uid("Action", group)]
    yield {"uid": uid("Action", asked.action.value), "attrs": {}, "parents": parents}


def uid(kind: str, name: str) -> dict[str, str]:
    """Write the name of an entity."""
    return {"type": kind, "id": name}


def _chain(
    kind: str, above: str, texts: Sequence[str], attributes: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    # The thing itself is also a place: a prefix that names it holds it.
    yield {"uid": uid(kind, texts[0]), "attrs": dict(attributes or {}), "parents": [uid(above, texts[0])]}
    for place, text in enumerate(texts):
        parents = [uid(above, texts[place + 1])] if place + 1 < len(texts) else []
        yield {"uid": uid(above, text), "attrs": {}, "parents": parents}


def _meant(actions: frozenset[str], literals: frozenset[str]) -> set[str]:
    """Give the mentioned names that a family of the question holds: who asks for all of them asks for each."""
    families = tuple(name[:-1] for name in actions if name.endswith(".*"))
    return {text for text in literals if text.startswith(families)} if families else set()


def _reference(kind: str, name: str) -> dict[str, Any]:
    return {"__entity": uid(kind, name)}
