"""Files of test cases for a policy: questions, and what is expected of them. Read strictly: a misspelt expectation must not pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker.cli.inputs import read_file
from broker.errors import BrokerError, Invalid
from broker.server.tasks.config import Audience, Audiences
from broker.server.tasks.policy import bundle as bundles
from broker.server.tasks.policy.asked import Action, ApprovalAsked, Asked, Question
from broker.server.tasks.policy.decision import Decision, Effect
from broker.server.tasks.policy.rules import Rules
from broker.spiffe import SpiffeId
from broker.spiffe.strictyaml import NotYaml, read_yaml
from broker.tasks import Resource

MAX_CASES: Final = 10_000
BUILT_IN: Final = "built-in"
_APPROVER: Final = frozenset({"approver", "approver_issuer"})
_TEXTS: Final = _APPROVER | {"action", "agent", "user", "issuer", "audience", "acr", "supervision", "risk"}
_NUMBERS: Final = frozenset({"hop", "auth_age"})
_NEEDED: Final = frozenset({"action", "agent", "user", "issuer", "audience"})
_MEMBERS: Final = _TEXTS | _NUMBERS | {"actions", "identified"}


@dataclass(frozen=True, slots=True)
class Case:
    """One question and what is expected: an effect, and exactly these rules where ``rules`` is not None."""

    name: str
    asked: Question
    effect: Effect
    rules: frozenset[str] | None


@dataclass(frozen=True, slots=True)
class Result:
    """One case and what was decided."""

    case: Case
    decision: Decision

    @property
    def holds(self) -> bool:
        """Tell whether it is what was expected."""
        wanted = self.case.rules
        return self.decision.effect is self.case.effect and (wanted is None or wanted == frozenset(self.decision.rules))


@dataclass(frozen=True, slots=True)
class CaseFile:
    """A file: the policy that it names (a path, ``built-in``, or empty), and its cases."""

    policy: str
    cases: Sequence[Case]


def read_cases(name: str) -> CaseFile:
    """Read a file, ``-`` being standard input; raises Invalid with the place of what is wrong."""
    try:
        value = read_yaml(read_file(name, "the file of cases"))
    except NotYaml as error:
        raise _wrong(f"it is neither YAML nor JSON{error.place}") from None
    top = _object(value, "the file", {"policy", "audiences", "cases"})
    risks = {
        resource: risk for one in _list(top.get("audiences", []), "audiences") for resource, risk in [_audience(one)]
    }
    items = _list(top.get("cases"), "cases")
    if not 0 < len(items) <= MAX_CASES:
        raise _wrong(
            f"there are not 1 to {MAX_CASES} cases", hint="a file without cases would pass whatever the policy is"
        )
    policy = _text(top.get("policy", ""), "policy")
    if policy and policy != BUILT_IN and name != "-":
        policy = str(Path(name).parent / policy)
    return CaseFile(policy, [_case(item, f"case {number}", risks) for number, item in enumerate(items, 1)])


def run_cases(bundle: bundles.Bundle, cases: Sequence[Case]) -> list[Result]:
    """Ask each question, by the code that decides in the server."""
    rules = Rules(Audiences(), bundle)
    return [Result(case, rules.judge(case.asked)) for case in cases]


def _audience(item: object) -> tuple[Resource, str]:
    told = _object(item, "an audience", {"resource", "risk"})
    audience = Audience(Resource(_text(told.get("resource"), "resource")), risk=_text(told.get("risk", "high"), "risk"))
    return audience.resource, audience.risk


def _case(item: object, where: str, risks: Mapping[Resource, str]) -> Case:
    told = _object(item, where, {"name", "ask", "expect", "rules"})
    where = f"{where} ({_text(told['name'], where)})" if "name" in told else where
    try:
        effect = Effect(_text(told.get("expect"), f"{where}: expect"))
    except ValueError:
        raise _wrong(f"{where}: expect is not allow, deny or approval") from None
    rules = None
    if "rules" in told:
        rules = frozenset(_text(one, f"{where}: rules") for one in _list(told["rules"], f"{where}: rules"))
    try:
        asked = _asked(_object(told.get("ask"), f"{where}: ask", _MEMBERS), where, risks)
    except BrokerError as error:
        raise error if error.reason == "invalid_case_file" else _wrong(f"{where}: {error.message}") from None
    return Case(_text(told.get("name", where), where), asked, effect, rules)


def _asked(told: Mapping[str, Any], where: str, risks: Mapping[Resource, str]) -> Question:
    missing = sorted(_NEEDED - told.keys())
    if missing:
        raise _wrong(f"{where}: ask has no {missing[0]}")
    texts = {name: _text(told[name], f"{where}: {name}") for name in _TEXTS & told.keys()}
    try:
        action = Action(texts["action"])
    except ValueError:
        raise _wrong(f"{where}: there is no action {texts['action']}") from None
    facts = _facts(told, texts, where, risks)
    if action is Action.APPROVE:
        if "approver" not in texts:
            raise _wrong(f"{where}: ask has no approver")
        issuer = texts.get("approver_issuer", texts["issuer"])
        return ApprovalAsked(approver=texts["approver"], approver_issuer=issuer, **facts)
    if _APPROVER & told.keys():
        raise _wrong(f"{where}: an approver is asked about with the action approve")
    return Asked(action=action, **facts)


def _facts(
    told: Mapping[str, Any], texts: Mapping[str, str], where: str, risks: Mapping[Resource, str]
) -> dict[str, Any]:
    numbers = {name: _number(told[name], f"{where}: {name}") for name in _NUMBERS & told.keys()}
    audience = Resource(texts["audience"])
    identified = told.get("identified", False)
    if not isinstance(identified, bool):
        raise _wrong(f"{where}: identified is not true or false")
    names = _list(told.get("actions", []), f"{where}: actions")
    return {
        "agent": SpiffeId(texts["agent"]),
        "user": texts["user"],
        "issuer": texts["issuer"],
        "audience": audience,
        "risk": texts.get("risk", risks.get(audience, "high")),
        "actions": frozenset(_text(one, f"{where}: actions") for one in names),
        "identified": identified,
        "acr": texts.get("acr"),
        "auth_age": numbers.get("auth_age"),
        "hop": numbers.get("hop", 0),
        "supervision": texts.get("supervision", "attached"),
    }


def _object(value: object, where: str, names: frozenset[str] | set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(f"{where} is missing or no object")
    unknown = sorted(str(name) for name in value.keys() - names)
    if unknown:
        raise _wrong(f"{where} has an unknown member {unknown[0]}", hint=f"known are {', '.join(sorted(names))}")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(f"{where} is missing or no list")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(f"{where} is missing or no text")
    return value


def _number(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(f"{where} is no whole number")
    return value


def _wrong(what: str, hint: str = "") -> Invalid:
    return Invalid(f"the file of cases is not valid: {what}", code="invalid_case_file", hint=hint)
