"""Which rules are accepted at all: a bundle is read, validated against the schema and linted before it decides anything.

A bundle that does not validate is refused whole, with every problem that was found. Pure, but for the engine's parser.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from typing import Any, Final

from broker.errors import Invalid
from broker.server.tasks.policy import cedar
from broker.server.tasks.policy.asked import Action
from broker.server.tasks.policy.lints import APPROVAL, Problem, attributes_of, lints, named_actions, names_approving
from broker.spiffe.jose import b64url_encode

MAX_BYTES: Final = 64 * 1024
"""Largest bundle, in bytes of UTF-8: it travels whole in one change of the log, and is a few hundred rules."""
MAX_RULES: Final = 256
"""Most rules of one bundle: each is looked at for each question."""
MAX_RULE: Final = 4_096
"""Longest rule, in characters, with the comment before it."""
MAX_NESTING: Final = 32
"""Deepest brackets. The engine's parser recurses without a bound of its own: a thousand end the process."""
MAX_PROBLEMS: Final = 50
"""Most problems told of one bundle."""

# Strings and comments whole, so that a bracket in them is none; then brackets and ends of rules; then anything else.
_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|[()\[\]{};]|[^"/()\[\]{};]+|.', re.DOTALL)
# a.b.c…: the engine needs minutes for a thousand of them; the schema has two at most.
_CHAIN: Final = re.compile(r"(?:\.\s*\w+\s*){9}")


class PolicyRefused(Invalid):
    """The bundle is not accepted; ``problems`` says all that was found."""

    code = "policy_refused"

    def __init__(self, problems: Sequence[Problem]) -> None:
        """Tell the first problem, and carry all."""
        first = problems[0]
        where = f"{first.rule}: " if first.rule else ""
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(
            f"{where}{first.message}{more}", code=first.code, hint="broker policy check FILE shows every problem"
        )
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: its ``@id``, whether it permits, its ``@advice``, whether a person may lift it, and to which actions it applies."""

    name: str
    permits: bool
    advice: str
    by_approval: bool
    actions: frozenset[Action]
    reads: frozenset[str]


@dataclass(frozen=True, slots=True)
class Bundle:
    """Rules that were accepted. ``rules`` stand in the order of the text, which is how the engine numbers them.

    ``hash`` is of the text's bytes; ``lifted`` are the rules without those that a person's approval lifts, None where there
    are none. ``approving`` are those that say who approves, None where none permits it to anybody.
    """

    text: str = field(repr=False)
    hash: str
    rules: tuple[Rule, ...]
    parsed: cedar.Parsed = field(repr=False, compare=False)
    engine: cedar.Engine = field(repr=False, compare=False)
    lifted: "Bundle | None" = field(default=None, repr=False, compare=False)
    approving: "Bundle | None" = field(default=None, repr=False, compare=False)

    reads: Mapping[Action, frozenset[str]] = field(init=False, repr=False, compare=False)
    """The attributes that a rule about an action looks at: what none reads cannot change the answer."""

    def __post_init__(self) -> None:
        """Gather what is read."""
        reads = {
            action: frozenset[str]().union(*(rule.reads for rule in self.rules if action in rule.actions))
            for action in Action
        }
        object.__setattr__(self, "reads", reads)

    def judging(self, action: Action) -> "Bundle | None":
        """Give the rules that judge an action: all, or those that say who approves. None: nothing permits it."""
        return self.approving if action is Action.APPROVE else self

    @property
    def is_closed(self) -> bool:
        """Tell whether no agent is permitted anything."""
        return not any(rule.permits and rule.actions != {Action.APPROVE} for rule in self.rules)

    @property
    def lacks_approver(self) -> bool:
        """Tell whether rules want a person's approval that nobody may give."""
        return self.lifted is not None and self.approving is None


def hash_of(text: str) -> str:
    """Give ``sha-256:`` and the hash of a bundle's bytes."""
    return "sha-256:" + b64url_encode(hashlib.sha256(text.encode()).digest())


def built_in() -> Bundle:
    """Give the bundle of a server that was given no other."""
    return read(built_in_text())


def built_in_text() -> str:
    """Give its text."""
    return resources.files(__package__).joinpath("default.cedar").read_text(encoding="utf-8")


def read(text: str) -> Bundle:
    """Read a bundle; raises PolicyRefused."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise PolicyRefused([Problem("", "policy_syntax", "the policy is not text in UTF-8")]) from None
    if size > MAX_BYTES:
        raise PolicyRefused([Problem("", "policy_too_large", f"the policy is longer than {MAX_BYTES} bytes")])
    _check_shape(text)
    try:
        return _read(text)
    except ValueError as error:
        raise PolicyRefused([Problem("", "policy_syntax", f"the policy cannot be read: {error}")]) from None
    except RecursionError:
        raise _too_deep() from None


@lru_cache(maxsize=4)
def _read(text: str) -> Bundle:
    # Kept, since a push reads before its transaction what comes into force after it, and reading 256 rules takes 0.4 s.
    parsed = cedar.parse(text)
    if parsed.has_templates:
        raise PolicyRefused([Problem("", "policy_template", "a rule has a slot such as ?principal: write its entity")])
    if len(parsed.rules) > MAX_RULES:
        raise PolicyRefused([Problem("", "policy_too_large", f"the policy has more than {MAX_RULES} rules")])
    names = [_name(rule, number) for number, rule in enumerate(parsed.rules)]
    problems = [*lints(parsed.rules, names), *_invalid(text, parsed.rules, names)]
    if problems:
        raise PolicyRefused(problems[:MAX_PROBLEMS])
    return _bundle(text, parsed)


def _check_shape(text: str) -> None:
    """Refuse what the engine must not be given: brackets too deep, rules too long; raises PolicyRefused."""
    depth = length = 0
    for match in _TOKEN.finditer(text):
        part = match[0]
        length += len(part)
        if part in "([{":
            depth += 1
        elif part in ")]}":
            depth -= 1
        elif part == ";":
            length = 0
        if depth > MAX_NESTING or _CHAIN.search(part):
            raise _too_deep()
        if length > MAX_RULE:
            raise PolicyRefused([Problem("", "policy_too_large", f"a rule is longer than {MAX_RULE} characters")])


def _too_deep() -> PolicyRefused:
    return PolicyRefused([Problem("", "policy_syntax", f"a rule is nested deeper than {MAX_NESTING}")])


def _bundle(text: str, parsed: cedar.Parsed) -> Bundle:
    rules = tuple(map(_rule, parsed.rules))
    hash_ = hash_of(text)

    def only(numbers: Iterable[int]) -> Bundle:
        # The engine numbers them from 0 again, and so do their rules.
        kept = tuple(numbers)
        return Bundle(text, hash_, tuple(rules[number] for number in kept), parsed, parsed.only(kept))

    numbers = range(len(rules))
    lifted = [number for number in numbers if not rules[number].by_approval]
    approving = [number for number in numbers if Action.APPROVE in rules[number].actions]
    return replace(
        only(numbers),
        lifted=only(lifted) if len(lifted) < len(rules) else None,
        approving=only(approving) if any(rules[number].permits for number in approving) else None,
    )


def _rule(rule: Mapping[str, Any]) -> Rule:
    annotations = rule.get("annotations", {})
    return Rule(
        annotations["id"],
        rule["effect"] == "permit",
        annotations.get("advice") or "",
        annotations.get("requires") == APPROVAL,
        _actions(rule, annotations),
        frozenset(attributes_of(rule)),
    )


def _actions(rule: Mapping[str, Any], annotations: Mapping[str, Any]) -> frozenset[Action]:
    """Give the actions that a rule is about.

    Approving is special: a permit is about it only where its scope says so, so that one of every action makes nobody an approver;
    and no forbid that approval lifts stands against approving.
    """
    named = named_actions(rule)
    found = {action for action in Action if not named or action.value in named or action.group in named}
    if not names_approving(rule) and (rule["effect"] == "permit" or "requires" in annotations):
        found.discard(Action.APPROVE)
    return frozenset(found)


def _name(rule: Mapping[str, Any], number: int) -> str:
    return rule.get("annotations", {}).get("id") or f"rule {number + 1}"


def _invalid(text: str, rules: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[Problem]:
    of_agents = {number for number, rule in enumerate(rules) if not names_approving(rule)}
    for number, message in cedar.validate(text, of_agents):
        yield Problem("" if number is None else names[number], "policy_invalid", message)
