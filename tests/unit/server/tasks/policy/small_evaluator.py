"""A policy evaluator of our own, for the part of Cedar that the schema lets rules use: what the adapter is held against.

Rules are values that hypothesis makes; they are written as Cedar text for the engine and evaluated here, each by its own code.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from broker.server.tasks.policy.asked import Action, ApprovalAsked, Asked, Question
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
OF_AGENTS = [action for action in Action if action is not Action.APPROVE]
APPROVE = Action.APPROVE.value


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
    who: tuple[str, str]
    action: tuple[str, str]
    audience: tuple[str, str]
    when: Condition | None
    unless: Condition | None
    by_approval: bool = False


# ---- as Cedar


def cedar_text(rules: Iterable[MadeRule]) -> str:
    return "\n".join(map(_rule_text, rules))


def _rule_text(rule: MadeRule) -> str:
    who = _who_text(*rule.who)
    action = _scope("action", rule.action, {"is": "Action", "in": "Action"}, str)
    audience = _scope(
        "resource", rule.audience, {"is": "Audience", "in": "Location"}, lambda path: f"https://s.example.org{path}"
    )
    head = "permit" if rule.permits else "forbid"
    requires = '@requires("approval") ' if rule.by_approval else ""
    when = f" when {{ {_text(rule.when)} }}" if rule.when else ""
    unless = f" unless {{ {_text(rule.unless)} }}" if rule.unless else ""
    return f'@id("{rule.name}") {requires}{head} ({who}, {action}, {audience}){when}{unless};'


def _who_text(how: str, what: str) -> str:
    match how:
        case "user":
            return f'principal == User::"{what}"'
        case "issuer":
            return f'principal in Issuer::"{what}"'
    kinds = {"is": "Agent", "in": "AgentPath"}
    return _scope("principal", (how, what), kinds, lambda path: f"spiffe://example.org{path}")


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
        case "acts":
            return f'(context has agent && context.agent in AgentPath::"spiffe://example.org{operand}")'
        case "asks":
            return f'principal in AgentPath::"spiffe://example.org{operand}"'
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


def evaluate(rules: Sequence[MadeRule], asked: Question) -> tuple[str, frozenset[str]]:
    """Give ``allow``, ``deny`` or ``approval``, and the names of the rules that decided."""
    mentioned = frozenset(name for rule in rules for name in _mentioned(rule))
    actions = asked.actions | {
        name for name in mentioned for family in asked.actions if family.endswith(".*") and name.startswith(family[:-1])
    }
    counted = [rule for rule in rules if isinstance(asked, Asked) or _is_of_approving(rule)]
    if isinstance(asked, ApprovalAsked) and not any(rule.permits for rule in counted):
        return "deny", frozenset()  # nobody approves: what stands against it is not asked
    satisfied = [rule for rule in counted if _applies(rule, asked, actions)]
    permits = frozenset(rule.name for rule in satisfied if rule.permits)
    forbids = [rule for rule in satisfied if not rule.permits]
    if not forbids:
        return ("allow", permits) if permits else ("deny", frozenset())
    if all(rule.by_approval for rule in forbids):
        return ("approval", frozenset(rule.name for rule in forbids)) if permits else ("deny", frozenset())
    return "deny", frozenset(rule.name for rule in forbids)


def _is_of_approving(rule: MadeRule) -> bool:
    """Tell whether a rule counts where somebody approves: permits by name, forbids unless approval lifts them."""
    return rule.action[1] == APPROVE or not (rule.permits or rule.by_approval)


def _mentioned(rule: MadeRule) -> Iterable[str]:
    stack = [part for part in (rule.when, rule.unless) if part]
    while stack:
        condition = stack.pop()
        stack.extend(condition.parts)
        if condition.kind in {"does", "family"}:
            yield str(condition.operand)
        elif condition.kind == "only":
            yield from condition.operand


def _applies(rule: MadeRule, asked: Question, actions: frozenset[str]) -> bool:
    return (
        _is_who(rule.who, asked)
        and _acts(rule.action, asked.action)
        and _within(rule.audience, asked.audience.text.removeprefix("https://s.example.org"))
        and (rule.when is None or _true(rule.when, asked, actions))
        and (rule.unless is None or not _true(rule.unless, asked, actions))
    )


def _is_who(wanted: tuple[str, str], asked: Question) -> bool:
    how, what = wanted
    if isinstance(asked, ApprovalAsked):
        theirs = {"any": "", "user": asked.approver, "issuer": asked.approver_issuer}
        return theirs.get(how) == what
    return how not in {"user", "issuer"} and _within(wanted, asked.agent.path)


def _within(wanted: tuple[str, str], path: str) -> bool:
    how, what = wanted
    if how == "any":
        return True
    # Segment by segment, not by text.
    mine, theirs = path.split("/"), what.split("/")
    return mine == theirs if how == "is" else mine[: len(theirs)] == theirs


def _acts(wanted: tuple[str, str], action: Action) -> bool:
    how, what = wanted
    begin = {"startTask", "startChild", "handOff", "resumeTask"}
    group = "begin" if action.value in begin else "issue" if action.value != APPROVE else None
    return how == "any" or what == action.value or (how == "in" and what == group)


def _true(condition: Condition, asked: Question, actions: frozenset[str]) -> bool:
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
        case "acts":
            return isinstance(asked, ApprovalAsked) and _within(("in", str(operand)), asked.agent.path)
        case "asks":
            return isinstance(asked, Asked) and _within(("in", str(operand)), asked.agent.path)
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
    st.builds(Condition, st.just("acts"), st.sampled_from(AGENTS)),
    st.builds(Condition, st.just("asks"), st.sampled_from(AGENTS)),
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
    of_agents = st.one_of(
        st.just(("any", "")),
        st.tuples(st.just("is"), st.sampled_from([one.value for one in OF_AGENTS])),
        st.tuples(st.just("in"), st.sampled_from(["begin", "issue"])),
    )
    approving = st.tuples(st.sampled_from(["is", "in"]), st.just(APPROVE))
    people = st.one_of(
        st.just(("any", "")),
        st.tuples(st.just("user"), st.sampled_from(USERS)),
        st.tuples(st.just("issuer"), st.sampled_from(ISSUERS)),
    )
    decides = st.booleans() if permits is None else permits
    return st.one_of(
        st.builds(_ruled, st.just(name), decides, scopes(AGENTS), of_agents, *_rest(), st.booleans()),
        st.builds(_ruled, st.just(name), decides, people, approving, *_rest(), st.just(False)),
        # A forbid of a person alone is one of approving, by whatever name.
        st.builds(_ruled, st.just(name), st.just(False), people, st.just(("any", "")), *_rest(), st.just(False)),
    )


def _rest() -> list[st.SearchStrategy]:
    return [scopes(PLACES), st.none() | conditions, st.none() | conditions]


def _ruled(name, permits, who, action, audience, when, unless, lifted) -> MadeRule:
    return MadeRule(name, permits, who, action, audience, when, unless, by_approval=lifted and not permits)


policies = st.integers(1, 5).flatmap(lambda count: st.tuples(*(made_rules(f"r{number}") for number in range(count))))

_asked = {
    "agent": st.sampled_from(AGENTS).map(lambda path: SpiffeId(f"spiffe://example.org{path}")),
    "audience": st.sampled_from(PLACES).map(lambda path: Resource(f"https://s.example.org{path}")),
    "risk": st.sampled_from(["high", "normal", "low"]),
    "actions": st.frozensets(st.sampled_from([*NAMES, *FAMILIES]), max_size=3),
    "identified": st.booleans(),
    "acr": st.none() | st.sampled_from(ACRS),
    "auth_age": st.none() | st.sampled_from(AGES),
    "hop": st.integers(0, 4),
    "supervision": st.sampled_from(["attached", "lease", "none"]),
}
agents_questions = st.builds(
    Asked,
    action=st.sampled_from(OF_AGENTS),
    user=st.sampled_from(USERS),
    issuer=st.sampled_from(ISSUERS),
    **_asked,
)
# One name is of one issuer, also where somebody asks about an approval of his own: that is refused elsewhere.
approvals = st.fixed_dictionaries(dict.fromkeys(USERS, st.sampled_from(ISSUERS))).flatmap(
    lambda issuers: st.tuples(st.sampled_from(USERS), st.sampled_from(USERS)).flatmap(
        lambda two: st.builds(
            ApprovalAsked,
            user=st.just(two[0]),
            issuer=st.just(issuers[two[0]]),
            approver=st.just(two[1]),
            approver_issuer=st.just(issuers[two[1]]),
            **_asked,
        )
    )
)
questions = agents_questions | approvals
