"""A policy evaluator of our own, for the part of Cedar that the schema lets rules use: what the adapter is held against.

Rules are values that hypothesis makes; they are written as Cedar text for the engine and evaluated here, each by its own code.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from broker.server.tasks.policy.asked import Action, Asked
from broker.spiffe import SpiffeId
from broker.tasks import Resource

AGENTS = ["/agent", "/agent/triage", "/agent-evil", "/agent/triage/2", "/other"]
PLACES = ["", "/a", "/a/b", "/ab", "/a-b"]
NAMES = ["ticket.read", "ticket.write", "ticket.read.all", "ticketing.read", "wiki.read"]
FAMILIES = ["ticket.*", "ticket.read.*", "wiki.*"]
USERS = ["alice", "bob"]
ISSUERS = ["https://idp.example.org", "https://other.example.org"]
ACRS = ["0", "mfa"]
AGES = [0, 59, 60, 61]


@dataclass(frozen=True)
class Condition:
    """A test of the circumstances: ``kind`` and its operand; ``parts`` of a combination."""

    kind: str
    operand: object = None
    parts: tuple["Condition", ...] = ()


@dataclass(frozen=True)
class MadeRule:
    name: str
    permits: bool
    agent: tuple[str, str]
    action: tuple[str, str]
    audience: tuple[str, str]
    when: Condition | None
    unless: Condition | None
    by_approval: bool = False


# ---- as Cedar


def cedar_text(rules: Iterable[MadeRule]) -> str:
    return "\n".join(map(_rule_text, rules))


def _rule_text(rule: MadeRule) -> str:
    agent = _scope(
        "principal", rule.agent, {"is": "Agent", "in": "AgentPath"}, lambda path: f"spiffe://example.org{path}"
    )
    action = _scope("action", rule.action, {"is": "Action", "in": "Action"}, str)
    audience = _scope(
        "resource", rule.audience, {"is": "Audience", "in": "Location"}, lambda path: f"https://s.example.org{path}"
    )
    head = "permit" if rule.permits else "forbid"
    requires = '@requires("approval") ' if rule.by_approval else ""
    when = f" when {{ {_text(rule.when)} }}" if rule.when else ""
    unless = f" unless {{ {_text(rule.unless)} }}" if rule.unless else ""
    return f'@id("{rule.name}") {requires}{head} ({agent}, {action}, {audience}){when}{unless};'


def _scope(variable, wanted, kinds, full):
    how, what = wanted
    if how == "any":
        return variable
    return f'{variable} {"==" if how == "is" else "in"} {kinds[how]}::"{full(what)}"'


def _text(condition: Condition) -> str:
    operand = condition.operand
    match condition.kind:
        case "and" | "or":
            return "(" + (" && " if condition.kind == "and" else " || ").join(map(_text, condition.parts)) + ")"
        case "not":
            return f"!({_text(condition.parts[0])})"
        case "risk":
            return f'resource.risk == Risk::"{operand}"'
        case "user":
            return f'context.user == User::"{operand}"'
        case "issuer":
            return f'context.user in Issuer::"{operand}"'
        case "has":
            return f"context has {operand}"
        case "acr":
            return f'(context has acr && context.acr == "{operand}")'
        case "age":
            return f"(context has auth_age && context.auth_age > {operand})"
        case "hop":
            return f"context.hop <= {operand}"
        case "identified":
            return "context.identified"
        case "supervision":
            return f'context.supervision == Supervision::"{operand}"'
        case "does":
            return f'context.actions.contains("{operand}")'
        case "only":
            return f"{list(operand)}.containsAll(context.actions)".replace("'", '"')
        case "family":
            return f'context.families.contains("{operand}")'
    raise AssertionError(condition)


# ---- evaluated here


def evaluate(rules: Sequence[MadeRule], asked: Asked) -> tuple[str, frozenset[str]]:
    """Give ``allow``, ``deny`` or ``approval``, and the names of the rules that decided."""
    mentioned = frozenset(name for rule in rules for name in _mentioned(rule))
    actions = asked.actions | {
        name for name in mentioned for family in asked.actions if family.endswith(".*") and name.startswith(family[:-1])
    }
    satisfied = [rule for rule in rules if _applies(rule, asked, actions)]
    permits = frozenset(rule.name for rule in satisfied if rule.permits)
    forbids = [rule for rule in satisfied if not rule.permits]
    if not forbids:
        return ("allow", permits) if permits else ("deny", frozenset())
    if all(rule.by_approval for rule in forbids):
        return ("approval", frozenset(rule.name for rule in forbids)) if permits else ("deny", frozenset())
    return "deny", frozenset(rule.name for rule in forbids)


def _mentioned(rule: MadeRule) -> Iterable[str]:
    stack = [part for part in (rule.when, rule.unless) if part]
    while stack:
        condition = stack.pop()
        stack.extend(condition.parts)
        if condition.kind in {"does", "family"}:
            yield str(condition.operand)
        elif condition.kind == "only":
            yield from condition.operand


def _applies(rule: MadeRule, asked: Asked, actions: frozenset[str]) -> bool:
    return (
        _within(rule.agent, asked.agent.path)
        and _acts(rule.action, asked.action)
        and _within(rule.audience, asked.audience.text.removeprefix("https://s.example.org"))
        and (rule.when is None or _true(rule.when, asked, actions))
        and (rule.unless is None or not _true(rule.unless, asked, actions))
    )


def _within(wanted: tuple[str, str], path: str) -> bool:
    how, what = wanted
    if how == "any":
        return True
    # Segment by segment, not by text.
    mine, theirs = path.split("/"), what.split("/")
    return mine == theirs if how == "is" else mine[: len(theirs)] == theirs


def _acts(wanted: tuple[str, str], action: Action) -> bool:
    how, what = wanted
    group = "begin" if action.value in {"startTask", "startChild", "handOff", "resumeTask"} else "issue"
    return how == "any" or what == action.value or (how == "in" and what == group)


def _true(condition: Condition, asked: Asked, actions: frozenset[str]) -> bool:
    operand = condition.operand
    match condition.kind:
        case "and":
            return all(_true(part, asked, actions) for part in condition.parts)
        case "or":
            return any(_true(part, asked, actions) for part in condition.parts)
        case "not":
            return not _true(condition.parts[0], asked, actions)
        case "risk" | "user" | "issuer" | "acr" | "supervision":
            return getattr(asked, condition.kind) == operand
        case "has":
            return getattr(asked, str(operand)) is not None
        case "age":
            return asked.auth_age is not None and asked.auth_age > operand
        case "hop":
            return asked.hop <= operand
        case "identified":
            return asked.identified
        case "does":
            return operand in actions
        case "only":
            return actions <= set(operand)
        case "family":
            return any(name.startswith(str(operand)[:-1]) for name in asked.actions)
    raise AssertionError(condition)


# ---- made


_leaves = st.one_of(
    st.builds(Condition, st.just("risk"), st.sampled_from(["high", "normal", "low"])),
    st.builds(Condition, st.just("user"), st.sampled_from(USERS)),
    st.builds(Condition, st.just("issuer"), st.sampled_from(ISSUERS)),
    st.builds(Condition, st.just("has"), st.sampled_from(["acr", "auth_age"])),
    st.builds(Condition, st.just("acr"), st.sampled_from(ACRS)),
    st.builds(Condition, st.just("age"), st.sampled_from(AGES)),
    st.builds(Condition, st.just("hop"), st.integers(0, 3)),
    st.just(Condition("identified")),
    st.builds(Condition, st.just("supervision"), st.sampled_from(["attached", "lease", "none"])),
    st.builds(Condition, st.just("does"), st.sampled_from([*NAMES, *FAMILIES])),
    st.builds(
        Condition, st.just("only"), st.lists(st.sampled_from([*NAMES, *FAMILIES]), min_size=1, max_size=3).map(tuple)
    ),
    st.builds(Condition, st.just("family"), st.sampled_from(FAMILIES)),
)
conditions = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.builds(
            Condition, st.sampled_from(["and", "or"]), st.none(), st.lists(inner, min_size=2, max_size=3).map(tuple)
        ),
        st.builds(Condition, st.just("not"), st.none(), inner.map(lambda part: (part,))),
    ),
    max_leaves=4,
)


def scopes(values: Sequence[str]) -> st.SearchStrategy[tuple[str, str]]:
    return st.one_of(st.just(("any", "")), st.tuples(st.sampled_from(["is", "in"]), st.sampled_from(values)))


def made_rules(name: str, permits: st.SearchStrategy[bool] | None = None) -> st.SearchStrategy[MadeRule]:
    actions = st.one_of(
        st.just(("any", "")),
        st.tuples(st.just("is"), st.sampled_from([one.value for one in Action])),
        st.tuples(st.just("in"), st.sampled_from(["begin", "issue"])),
    )
    return st.builds(
        MadeRule,
        st.just(name),
        st.booleans() if permits is None else permits,
        scopes(AGENTS),
        actions,
        scopes(PLACES),
        st.none() | conditions,
        st.none() | conditions,
    ).flatmap(lambda rule: st.just(rule) if rule.permits else st.booleans().map(lambda lifted: _lifted(rule, lifted)))


def _lifted(rule: MadeRule, lifted: bool) -> MadeRule:
    return MadeRule(*(getattr(rule, name) for name in list(rule.__dataclass_fields__)[:-1]), by_approval=lifted)


policies = st.integers(1, 5).flatmap(lambda count: st.tuples(*(made_rules(f"r{number}") for number in range(count))))

questions = st.builds(
    Asked,
    action=st.sampled_from(list(Action)),
    agent=st.sampled_from(AGENTS).map(lambda path: SpiffeId(f"spiffe://example.org{path}")),
    user=st.sampled_from(USERS),
    issuer=st.sampled_from(ISSUERS),
    audience=st.sampled_from(PLACES).map(lambda path: Resource(f"https://s.example.org{path}")),
    risk=st.sampled_from(["high", "normal", "low"]),
    actions=st.frozensets(st.sampled_from([*NAMES, *FAMILIES]), max_size=3),
    identified=st.booleans(),
    acr=st.none() | st.sampled_from(ACRS),
    auth_age=st.none() | st.sampled_from(AGES),
    hop=st.integers(0, 4),
    supervision=st.sampled_from(["attached", "lease", "none"]),
)
