"""What is refused of a policy that is valid: rules that would not do what they seem to.

A rule without a name, a literal that can match nothing (a forbid that never applies lets everything through), a rule that looks at
the agents behind the present one (RFC 8693 §4.1: they are information, never a reason), one that seems to say who approves and does
not. Pure: rules are what the engine writes of them in JSON.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from broker.errors import BrokerError
from broker.server.tasks.policy.asked import Action
from broker.spiffe import SpiffeId
from broker.tasks import Resource
from broker.tasks.texts import NAME, check_issuer, check_name

MAX_ADVICE: Final = 300
"""Longest advice, in characters: it is shown to whoever is refused."""

_ACTOR_CHAIN: Final = frozenset({"act", "actor", "actors", "act_chain", "chain", "ancestors", "parent", "root"})
"""Names under which a rule would look for the agents behind the present one (attack AC08)."""
_ANNOTATIONS: Final = frozenset({"id", "advice", "requires"})
APPROVAL: Final = "approval"
_ACTIONS: Final = {"left": {"Var": "context"}, "attr": "actions"}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a bundle is refused: which rule (its id, or its place, or empty), a stable code, and a sentence."""

    rule: str
    code: str
    message: str


def lints(rules: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[Problem]:
    """Give what is wrong with rules of these names, each as the engine writes it in JSON."""
    for number, (rule, name) in enumerate(zip(rules, names, strict=True)):
        annotations = rule.get("annotations", {})
        if not annotations.get("id"):
            yield Problem(name, "policy_unnamed", 'it has no @id("…"): a decision names the rule that made it')
        elif NAME.fullmatch(name) is None:
            yield Problem(name, "policy_unnamed", "its @id is not printable ASCII")
        elif name in names[:number]:
            yield Problem(name, "policy_name_twice", "another rule has the same @id")
        yield from _annotation_lints(rule, annotations, name)
        for attribute in sorted(_ACTOR_CHAIN & set(attributes_of(rule))):
            yield Problem(
                name, "policy_reads_act", f"it reads {attribute}: only the present actor decides, never those behind it"
            )
        if any(_compares_actions(node) for node in _nodes(rule.get("conditions", []))):
            yield Problem(
                name,
                "policy_literal",
                "it compares context.actions as a whole: ask what it contains, or what contains it",
            )
        yield from _literal_lints(rule, name)
        yield from _approving_lints(rule, annotations, name)


def _annotation_lints(rule: Mapping[str, Any], annotations: Mapping[str, Any], name: str) -> Iterator[Problem]:
    for unknown in sorted(annotations.keys() - _ANNOTATIONS):
        yield Problem(name, "policy_annotation", f"@{unknown} is not known here: known are @id, @advice and @requires")
    advice = annotations.get("advice") or ""
    if len(advice) > MAX_ADVICE or not advice.isprintable():
        yield Problem(name, "policy_annotation", f"its @advice is not printable text of {MAX_ADVICE} characters")
    if "requires" in annotations and (annotations["requires"] != APPROVAL or rule["effect"] != "forbid"):
        yield Problem(name, "policy_annotation", '@requires("approval") is all that can be required, and by a forbid')


def _approving_lints(rule: Mapping[str, Any], annotations: Mapping[str, Any], name: str) -> Iterator[Problem]:
    if names_approving(rule):
        if "requires" in annotations:
            yield Problem(name, "policy_approving", "it is about approving, which waits for nobody's approval")
    elif rule["effect"] == "permit" and (_is_of_users(rule["principal"]) or _speaks_of_approving(rule)):
        yield Problem(
            name, "policy_approving", 'it permits approving only where its scope says action == Action::"approve"'
        )


def _literal_lints(rule: Mapping[str, Any], name: str) -> Iterator[Problem]:
    for kind, text in _entities(rule):
        canonical = _CANONICAL.get(kind)
        if canonical is None:
            continue
        try:
            found = canonical(text)
        except BrokerError as error:
            yield Problem(name, "policy_literal", f'{kind}::"{text}" can match nothing: {error.message}')
            continue
        if found != text:
            yield Problem(name, "policy_literal", f'{kind}::"{text}" can match nothing: write {kind}::"{found}"')


def _user(text: str) -> str:
    check_name(text, "user")
    return text


def _issuer(text: str) -> str:
    check_issuer(text, "issuer")
    return text


_CANONICAL: Final[Mapping[str, Callable[[str], str]]] = {
    "Agent": lambda text: str(SpiffeId(text)),
    "AgentPath": lambda text: str(SpiffeId(text)),
    "Audience": lambda text: Resource(text).text,
    # A place holds what lies below it, with a slash at its end or without: there is one way to write it.
    "Location": lambda text: Resource(text.rstrip("/")).text,
    "User": _user,
    "Issuer": _issuer,
}
"""How each kind of literal is written; other kinds are closed lists of the schema."""


# ---- walking through a rule as the engine writes it in JSON


def _nodes(value: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        yield value
        for member in value.values():
            yield from _nodes(member)
    elif isinstance(value, list):
        for member in value:
            yield from _nodes(member)


def _compares_actions(node: Mapping[str, Any]) -> bool:
    sides = node.get("==") or node.get("!=")
    if not isinstance(sides, Mapping):
        return False
    # A family stands for names that are not in the set: only asking for members, or for a bound, keeps its meaning.
    return any(isinstance(side, Mapping) and side.get(".") == _ACTIONS for side in sides.values())


def attributes_of(rule: Mapping[str, Any]) -> Iterator[str]:
    """Give the attributes that a rule looks at."""
    return (node["attr"] for node in _nodes(rule.get("conditions", [])) if isinstance(node.get("attr"), str))


def _entities(rule: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for node in _nodes(rule):
        if isinstance(node.get("type"), str) and isinstance(node.get("id"), str):
            yield node["type"], node["id"]


def named_actions(rule: Mapping[str, Any]) -> frozenset[str]:
    """Give the actions and groups that a rule's scope names; none where it is about all."""
    scope = rule["action"]
    return frozenset(one["id"] for one in scope.get("entities", [scope.get("entity")]) if one is not None)


def names_approving(rule: Mapping[str, Any]) -> bool:
    """Tell whether a rule's scope says that it is about approving."""
    return Action.APPROVE.value in named_actions(rule)


def _is_of_users(scope: Mapping[str, Any]) -> bool:
    entity = scope.get("entity") or {}
    return scope.get("entity_type", entity.get("type")) in {"User", "Issuer"}


def _speaks_of_approving(rule: Mapping[str, Any]) -> bool:
    return ("Action", Action.APPROVE.value) in _entities(rule)
