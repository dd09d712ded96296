"""Cedar, through cedarpy: the one module that knows the engine. Parsed once, asked often.

What its answers need before they can be trusted (each was reproduced with the pinned version): an error inside a forbid skips the
forbid and the answer is Allow beside a diagnostic, so that any diagnostic denies; reasons come back as ``policy0…n`` and are
numbers of rules here; there are no floats, so that numbers are integers. Questions are not validated against the schema each time
(it would double the price): ``facts`` alone builds them, and a test holds every one that it builds against the schema.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Final

import cedarpy

from broker.server.tasks.policy.asked import Question
from broker.server.tasks.policy.facts import circumstances, entities_of, uid

ENTITIES_KEPT: Final = 4_096
"""Entity sets kept parsed: of each pair of agent and audience, and user, that asks. Some KiB each; then it starts anew."""

_NUMBERED: Final = re.compile(r"policy([0-9]{1,6})")
_UNLIKE: Final = re.compile(r"the types .* are not compatible")
"""How the engine refuses that two kinds are compared; asked, it says that they are not the same."""


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

    def ask(self, asked: Question, reads: frozenset[str]) -> Verdict:
        """Ask one question; of the circumstances only those in ``reads`` are told, since no rule looks at the others."""
        request = {
            "principal": uid(*asked.principal),
            "action": uid("Action", asked.action.value),
            "resource": uid("Audience", asked.audience.text),
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

    def _known(self, asked: Question) -> cedarpy.Entities:
        key = (asked.agent, asked.audience, asked.risk, asked.users, asked.action)
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


def validate(text: str, of_agents: Collection[int] = ()) -> Sequence[tuple[int | None, str]]:
    """Hold a text against the schema; give the number of the rule, where one is to blame, and the engine's words.

    ``of_agents`` are the rules that do not name approving. One that compares whoever asks with an agent
    (``[Agent::"…"].contains(principal)``) has a person there as well, since approving is an action; the comparison is false then
    and no error. So it is right where it is right about agents: it was accepted before anybody approved.
    """
    problems = _problems(text, _schema(schema_text()))
    unlike = {number for number, words in problems if number in of_agents and _UNLIKE.fullmatch(words)}
    if unlike:
        unlike -= {number for number, _ in _problems(text, _schema(agents_schema_text()))}
    return [(number, words) for number, words in problems if number not in unlike or not _UNLIKE.fullmatch(words)]


def _problems(text: str, schema: cedarpy.Schema) -> Sequence[tuple[int | None, str]]:
    result = cedarpy.validate_policies(text, schema)
    problems = [(_number(one.policy_id), _told(one.error)) for one in result.errors]
    # Fail closed: a refusal without a reason is one all the same.
    return problems or ([] if result.validation_passed else [(None, "it does not validate against the schema")])


def _literals(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _literals(member)
    elif isinstance(value, list):
        for member in value:
            yield from _literals(member)


def _number(policy_id: str) -> int | None:
    match = _NUMBERED.fullmatch(policy_id)
    return None if match is None else int(match[1])


def _told(message: str) -> str:
    # The engine names rules by number, which we say otherwise.
    return re.sub(r"^for policy `policy[0-9]+`, ", "", message)


def schema_text() -> str:
    """Give the schema's text: of what agents do, and of who approves."""
    return agents_schema_text() + _file("approving.cedarschema")


def agents_schema_text() -> str:
    """Give the part of it that is about what agents do."""
    return _file("schema.cedarschema")


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _schema(text: str) -> cedarpy.Schema:
    return cedarpy.Schema.from_str(text)
