"""Which rules are accepted at all: a bundle is read, validated against the schema and linted before it decides anything.

A bundle that does not validate is refused whole, with every problem that was found. What the lints refuse would not do what it
seems to: a rule without a name, a literal that can match nothing (a forbid that never applies lets everything through), a rule that
looks at the agents behind the present one (RFC 8693 §4.1: they are information, never a reason). Pure, but for the engine's parser.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any, Final

from broker.errors import BrokerError, Invalid
from broker.server.tasks.policy import cedar
from broker.server.tasks.policy.asked import Action
from broker.spiffe import SpiffeId
from broker.spiffe.jose import b64url_encode
from broker.tasks import Resource
from broker.tasks.texts import NAME, check_issuer, check_name

MAX_BYTES: Final = 64 * 1024
"""Largest bundle, in bytes of UTF-8: it travels whole in one change of the log, and is a few hundred rules."""
MAX_RULES: Final = 256
"""Most rules of one bundle: each is looked at for each question."""
MAX_RULE: Final = 4_096
"""Longest rule, in characters, with the comment before it."""
MAX_NESTING: Final = 32
"""Deepest brackets. The engine's parser recurses without a bound of its own: a thousand end the process."""
MAX_ADVICE: Final = 300
"""Longest advice, in characters: it is shown to whoever is refused."""
MAX_PROBLEMS: Final = 50
"""Most problems told of one bundle."""

_ACTOR_CHAIN: Final = frozenset({"act", "actor", "actors", "act_chain", "chain", "ancestors", "parent", "root"})
"""Names under which a rule would look for the agents behind the present one (attack AC08)."""
# Strings and comments whole, so that a bracket in them is none; then brackets and ends of rules; then anything else.
_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|[()\[\]{};]|[^"/()\[\]{};]+|.', re.DOTALL)
# a.b.c…: the engine needs minutes for a thousand of them; the schema has two at most.
_CHAIN: Final = re.compile(r"(?:\.\s*\w+\s*){9}")
_ANNOTATIONS: Final = frozenset({"id", "advice", "requires"})
_APPROVAL: Final = "approval"
_ACTIONS: Final = {"left": {"Var": "context"}, "attr": "actions"}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a bundle is refused: which rule (its id, or its place, or empty), a stable code, and a sentence."""

    rule: str
    code: str
    message: str


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
    are none.
    """

    text: str = field(repr=False)
    hash: str
    rules: tuple[Rule, ...]
    parsed: cedar.Parsed = field(repr=False, compare=False)
    engine: cedar.Engine = field(repr=False, compare=False)
    lifted: "Bundle | None" = field(default=None, repr=False, compare=False)

    reads: Mapping[Action, frozenset[str]] = field(init=False, repr=False, compare=False)
    """The attributes that a rule about an action looks at: what none reads cannot change the answer."""

    def __post_init__(self) -> None:
        """Gather what is read."""
        reads = {
            action: frozenset[str]().union(*(rule.reads for rule in self.rules if action in rule.actions))
            for action in Action
        }
        object.__setattr__(self, "reads", reads)

    @property
    def is_closed(self) -> bool:
        """Tell whether nothing is permitted at all."""
        return not any(rule.permits for rule in self.rules)


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
    problems = [*_lints(parsed.rules, names), *_invalid(text, names)]
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
    kept = [number for number, rule in enumerate(rules) if not rule.by_approval]
    lifted = None
    if len(kept) < len(rules):
        lifted = Bundle(text, hash_of(text), tuple(rules[number] for number in kept), parsed, parsed.only(kept))
    return Bundle(text, hash_of(text), rules, parsed, parsed.only(range(len(rules))), lifted)


def _rule(rule: Mapping[str, Any]) -> Rule:
    annotations = rule.get("annotations", {})
    return Rule(
        annotations["id"],
        rule["effect"] == "permit",
        annotations.get("advice") or "",
        annotations.get("requires") == _APPROVAL,
        _actions(rule["action"]),
        frozenset(_attributes(rule)),
    )


def _name(rule: Mapping[str, Any], number: int) -> str:
    return rule.get("annotations", {}).get("id") or f"rule {number + 1}"


def _invalid(text: str, names: Sequence[str]) -> Iterator[Problem]:
    for number, message in cedar.validate(text):
        yield Problem("" if number is None else names[number], "policy_invalid", message)


def _lints(rules: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[Problem]:
    for number, (rule, name) in enumerate(zip(rules, names, strict=True)):
        annotations = rule.get("annotations", {})
        if not annotations.get("id"):
            yield Problem(name, "policy_unnamed", 'it has no @id("…"): a decision names the rule that made it')
        elif NAME.fullmatch(name) is None:
            yield Problem(name, "policy_unnamed", "its @id is not printable ASCII")
        elif name in names[:number]:
            yield Problem(name, "policy_name_twice", "another rule has the same @id")
        yield from _annotation_lints(rule, annotations, name)
        for attribute in sorted(_ACTOR_CHAIN & set(_attributes(rule))):
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


def _annotation_lints(rule: Mapping[str, Any], annotations: Mapping[str, Any], name: str) -> Iterator[Problem]:
    for unknown in sorted(annotations.keys() - _ANNOTATIONS):
        yield Problem(name, "policy_annotation", f"@{unknown} is not known here: known are @id, @advice and @requires")
    advice = annotations.get("advice") or ""
    if len(advice) > MAX_ADVICE or not advice.isprintable():
        yield Problem(name, "policy_annotation", f"its @advice is not printable text of {MAX_ADVICE} characters")
    if "requires" in annotations and (annotations["requires"] != _APPROVAL or rule["effect"] != "forbid"):
        yield Problem(name, "policy_annotation", '@requires("approval") is all that can be required, and by a forbid')


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


def _attributes(rule: Mapping[str, Any]) -> Iterator[str]:
    return (node["attr"] for node in _nodes(rule.get("conditions", [])) if isinstance(node.get("attr"), str))


def _entities(rule: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for node in _nodes(rule):
        if isinstance(node.get("type"), str) and isinstance(node.get("id"), str):
            yield node["type"], node["id"]


def _actions(scope: Mapping[str, Any]) -> frozenset[Action]:
    if scope["op"] == "All":
        return frozenset(Action)
    named = {one["id"] for one in scope.get("entities", [scope.get("entity")]) if one is not None}
    return frozenset(action for action in Action if action.value in named or action.group in named)
