"""Cedar, through cedarpy: the one module that knows the engine. Parsed once, asked often.

What its answers need before they can be trusted (each was reproduced with the pinned version): an error inside a forbid skips the
forbid and the answer is Allow beside a diagnostic, so that any diagnostic denies; reasons come back as ``policy0…n`` and are
numbers of rules here; there are no floats, so that numbers are integers. Questions are not validated against the schema each time
(it would double the price): this module alone builds them, and a test holds every one it builds against the schema.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Final

import cedarpy

from broker.server.tasks.policy.asked import Asked, families_of, paths_above, places_above

ENTITIES_KEPT: Final = 4_096
"""Entity sets kept parsed: of each pair of agent and audience, and user, that asks. Some KiB each; then it starts anew."""

_NUMBERED: Final = re.compile(r"policy([0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the engine said: whether it allows, the numbers of the rules that decided, and what it could not evaluate."""

    allows: bool
    rules: tuple[int, ...]
    errors: tuple[str, ...]


class Engine:
    """One parsed set of rules, numbered from 0 in the order in which they were given."""

    def __init__(self, policies: cedarpy.PolicySet, literals: frozenset[str]) -> None:
        """Take a parsed set, and the texts that its rules mention."""
        self._policies = policies
        self._literals = literals
        self._entities: dict[tuple[object, ...], cedarpy.Entities] = {}

    def ask(self, asked: Asked, reads: frozenset[str]) -> Verdict:
        """Ask one question; of the circumstances only those in ``reads`` are told, since no rule looks at the others."""
        request = {
            "principal": _uid("Agent", str(asked.agent)),
            "action": _uid("Action", asked.action.value),
            "resource": _uid("Audience", asked.audience.text),
            "context": json.dumps(circumstances(asked, reads, self._literals)),
        }
        answer = cedarpy.is_authorized(request, self._policies, self._known(asked))
        found = answer.diagnostics
        errors = tuple(found.errors)
        numbers = tuple(sorted(int(match[1]) for match in map(_NUMBERED.fullmatch, found.reasons) if match))
        if len(numbers) != len(found.reasons):
            # Rules are numbered by the engine; another name is one that nobody gave.
            errors += ("the engine named a rule that is not in the policy",)
        return Verdict(answer.allowed and not errors, numbers, errors)

    def _known(self, asked: Asked) -> cedarpy.Entities:
        key = (asked.agent, asked.audience, asked.risk, asked.user, asked.issuer, asked.action)
        entities = self._entities.get(key)
        if entities is None:
            if len(self._entities) >= ENTITIES_KEPT:
                self._entities.clear()
            text = json.dumps(list(entities_of(asked)))
            entities = self._entities[key] = cedarpy.Entities.from_json_str(text)
        return entities


@dataclass(frozen=True, slots=True)
class Parsed:
    """A text that is Cedar: its rules as the engine writes them in JSON, in the order of the text."""

    rules: tuple[Mapping[str, Any], ...] = field(repr=False)
    literals: frozenset[str]
    has_templates: bool

    def only(self, numbers: Iterable[int]) -> Engine:
        """Give an engine of these rules alone, numbered in their order from 0."""
        rules = {f"policy{place}": self.rules[number] for place, number in enumerate(numbers)}
        text = json.dumps({"templates": {}, "staticPolicies": rules, "templateLinks": []})
        return Engine(cedarpy.PolicySet.from_json_str(text), self.literals)


def parse(text: str) -> Parsed:
    """Read a text; raises ValueError with the engine's own words."""
    tree = json.loads(cedarpy.policies_to_json_str(text))
    static: dict[str, Any] = tree["staticPolicies"]
    rules = tuple(static[f"policy{number}"] for number in range(len(static))) if not tree["templates"] else ()
    literals = frozenset(_literals([rule.get("conditions", []) for rule in rules]))
    return Parsed(rules, literals, bool(tree["templates"]))


def validate(text: str) -> Sequence[tuple[int | None, str]]:
    """Hold a text against the schema; give the number of the rule, where one is to blame, and the engine's words."""
    result = cedarpy.validate_policies(text, _schema())
    problems = [(_number(one.policy_id), _told(one.error)) for one in result.errors]
    # Fail closed: a refusal without a reason is one all the same.
    return problems or ([] if result.validation_passed else [(None, "it does not validate against the schema")])


def circumstances(asked: Asked, reads: frozenset[str], literals: frozenset[str]) -> dict[str, Any]:
    """Give the context of a question, as the schema has it, without what nothing reads."""
    context: dict[str, Any] = {}
    if "user" in reads:
        context["user"] = _reference("User", asked.user)
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


def entities_of(asked: Asked) -> Iterator[dict[str, Any]]:
    """Give the entities of a question: agent and audience with all that they lie below, at segment boundaries."""
    yield from _chain("Agent", "AgentPath", paths_above(asked.agent))
    risk = {"risk": _reference("Risk", asked.risk)}
    yield from _chain("Audience", "Location", places_above(asked.audience), risk)
    yield {"uid": _uid("User", asked.user), "attrs": {}, "parents": [_uid("Issuer", asked.issuer)]}
    yield {"uid": _uid("Action", asked.action.value), "attrs": {}, "parents": [_uid("Action", asked.action.group)]}


def _chain(
    kind: str, above: str, texts: Sequence[str], attributes: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    # The thing itself is also a place: a prefix that names it holds it.
    yield {"uid": _uid(kind, texts[0]), "attrs": dict(attributes or {}), "parents": [_uid(above, texts[0])]}
    for place, text in enumerate(texts):
        parents = [_uid(above, texts[place + 1])] if place + 1 < len(texts) else []
        yield {"uid": _uid(above, text), "attrs": {}, "parents": parents}


def _meant(actions: frozenset[str], literals: frozenset[str]) -> set[str]:
    """Give the mentioned names that a family of the question holds: who asks for all of them asks for each."""
    families = tuple(name[:-1] for name in actions if name.endswith(".*"))
    return {text for text in literals if text.startswith(families)} if families else set()


def _literals(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _literals(member)
    elif isinstance(value, list):
        for member in value:
            yield from _literals(member)


def _uid(kind: str, name: str) -> dict[str, str]:
    return {"type": kind, "id": name}


def _reference(kind: str, name: str) -> dict[str, Any]:
    return {"__entity": _uid(kind, name)}


def _number(policy_id: str) -> int | None:
    match = _NUMBERED.fullmatch(policy_id)
    return None if match is None else int(match[1])


def _told(message: str) -> str:
    # The engine names rules by number, which we say otherwise.
    return re.sub(r"^for policy `policy[0-9]+`, ", "", message)


def schema_text() -> str:
    """Give the schema's text."""
    return resources.files(__package__).joinpath("schema.cedarschema").read_text(encoding="utf-8")


@cache
def _schema() -> cedarpy.Schema:
    return cedarpy.Schema.from_str(schema_text())
