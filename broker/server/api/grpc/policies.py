"""``broker.server.v1.Policies``: the policy is shown, replaced and explained. Nothing here decides."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from broker._proto.broker.server.v1 import policies_pb2
from broker._proto.service import Context, ServiceBinding
from broker.audit.events import Event
from broker.errors import Invalid
from broker.server.api.access import Caller, name_of
from broker.server.api.grpc.convert import seconds
from broker.server.store.policy_ports import PolicyRow
from broker.server.tasks.config import Audiences
from broker.server.tasks.decision import task_unknown
from broker.server.tasks.policy import bundle as bundles
from broker.server.tasks.policy.asked import Action, ApprovalAsked, Asked, Question
from broker.server.tasks.policy.bundle import PolicyRefused, Rule
from broker.server.tasks.policy.bundles import Bundles
from broker.server.tasks.policy.explain import Explain, Explanation, Part
from broker.server.tasks.policy.rules import Rules
from broker.server.tasks.refusals import Refusals
from broker.spiffe import SpiffeId
from broker.tasks import Resource
from broker.tasks.texts import ID

BINDING: Final = ServiceBinding.of(policies_pb2.DESCRIPTOR, "Policies")


class Policies:
    """The service, over its use cases."""

    def __init__(
        self,
        stored: Bundles,
        explain: Explain,
        rules: Rules,
        audiences: Audiences,
        *,
        issuers: Sequence[str],
        refusals: Refusals,
    ) -> None:
        """``issuers`` are those of user tokens: where there is one, a question need not name it."""
        self._refusals = refusals
        self._issuers = issuers
        self._stored = stored
        self._explain = explain
        self._rules = rules
        self._audiences = audiences

    async def GetPolicy(  # noqa: N802 - the RPC's name
        self, request: policies_pb2.GetPolicyRequest, context: Context, caller: Caller
    ) -> policies_pb2.Policy:
        """Give the policy in force, or an older one."""
        return self._written(await self._stored.show(request.hash))

    async def PushPolicy(  # noqa: N802 - the RPC's name
        self, request: policies_pb2.PushPolicyRequest, context: Context, caller: Caller
    ) -> policies_pb2.Policy:
        """Put another policy in force, or only read it."""
        if request.check_only:
            read = bundles.read(request.text)
            return policies_pb2.Policy(hash=read.hash, text=read.text, rules=_rules(read.rules))
        by = f"operator:{name_of(caller)}"
        async with self._refusals.recorded_of(Event.ADMIN_REFUSED, by, "policy"):
            row = await self._stored.push(request.text, by=by, expected=request.expected_hash)
        return self._written(row)

    async def ExplainDecision(  # noqa: N802 - the RPC's name
        self, request: policies_pb2.ExplainDecisionRequest, context: Context, caller: Caller
    ) -> policies_pb2.ExplainDecisionResponse:
        """Explain a question, a task or a token."""
        match request.WhichOneof("about"):
            case "question":
                return _explanation(self._explain.question(self._asked(request.question)))
            case "task_id":
                if ID.fullmatch(request.task_id) is None:
                    raise task_unknown()
                return _explanation(await self._explain.task(request.task_id))
            case "token":
                return _explanation(await self._explain.token(request.token))
        raise Invalid("neither a question nor a task nor a token is there to explain", code="invalid_question")

    def _asked(self, told: policies_pb2.PolicyQuestion) -> Question:
        resource = Resource(told.audience)
        try:
            action = Action(told.action)
        except ValueError:
            known = ", ".join(one.value for one in Action)
            raise Invalid("there is no such action", code="invalid_question", hint=f"known are {known}") from None
        issuer = told.issuer or self._only_issuer()
        facts: dict[str, Any] = {
            "agent": SpiffeId(told.agent),
            "user": told.user,
            "issuer": issuer,
            "audience": resource,
            "risk": self._risk(resource, told.risk),
            "actions": frozenset(told.actions),
            "identified": told.identified,
            "acr": told.acr or None,
            "auth_age": told.auth_age if told.HasField("auth_age") else None,
            "hop": told.hop,
            "supervision": told.supervision or "attached",
        }
        if action is Action.APPROVE:
            return ApprovalAsked(approver=told.approver, approver_issuer=told.approver_issuer or issuer, **facts)
        if told.approver or told.approver_issuer:
            raise Invalid("an approver is asked about with the action approve", code="invalid_question")
        return Asked(action=action, **facts)

    def _risk(self, resource: Resource, told: str) -> str:
        registered = self._audiences.holding(resource)
        if registered is not None and registered.resource == resource and told not in ("", registered.risk):
            raise Invalid(
                f"that audience is registered with risk {registered.risk}",
                code="invalid_question",
                hint="leave risk out: it is the audience's own",
            )
        return told or (registered.risk if registered is not None else "high")

    def _only_issuer(self) -> str:
        if len(self._issuers) == 1:
            return self._issuers[0]
        raise Invalid(
            "the user's issuer is missing", code="invalid_question", hint="name it: there is not just one here"
        )

    def _written(self, row: PolicyRow) -> policies_pb2.Policy:
        return policies_pb2.Policy(
            hash=row.hash,
            text=row.text,
            source=row.source.value,
            put_by=row.put_by,
            put_at=seconds(row.put_at),
            version=row.version,
            in_force=row.hash == self._rules.hash,
            rules=_rules(_read_rules(row.text)),
        )


def _read_rules(text: str) -> tuple[Rule, ...]:
    try:
        return bundles.read(text).rules
    except PolicyRefused:
        return ()  # of another version of this program: its text says all that can be said


def _rules(rules: Iterable[Rule]) -> Iterable[policies_pb2.PolicyRule]:
    return [
        policies_pb2.PolicyRule(id=rule.name, effect=effect_of(rule), by_approval=rule.by_approval, advice=rule.advice)
        for rule in rules
    ]


def effect_of(rule: Rule) -> str:
    """Give ``permit`` or ``forbid``."""
    return "permit" if rule.permits else "forbid"


def _explanation(told: Explanation) -> policies_pb2.ExplainDecisionResponse:
    decision = told.decision
    return policies_pb2.ExplainDecisionResponse(
        effect=decision.effect.value,
        code=decision.code,
        message=decision.message,
        hint="" if decision.is_allowed else decision.hint,
        policy=decision.bundle,
        rules=decision.rules,
        errors=decision.errors,
        parts=map(_part, told.parts),
        task_id=told.task,
        task_state=told.state,
    )


def _part(part: Part) -> policies_pb2.ExplainedQuestion:
    return policies_pb2.ExplainedQuestion(
        question=_question(part.asked),
        effect=part.decision.effect.value,
        rules=part.decision.rules,
        errors=part.decision.errors,
        trace=[
            policies_pb2.ExplainedRule(id=rule.name, effect=effect_of(rule), standing=standing)
            for rule, standing in part.trace
        ],
    )


def _question(asked: Question) -> policies_pb2.PolicyQuestion:
    return policies_pb2.PolicyQuestion(
        action=asked.action.value,
        agent=str(asked.agent),
        user=asked.user,
        issuer=asked.issuer,
        audience=asked.audience.text,
        actions=sorted(asked.actions),
        identified=asked.identified,
        acr=asked.acr or "",
        auth_age=asked.auth_age,
        hop=asked.hop,
        supervision=asked.supervision,
        risk=asked.risk,
        approver=asked.approver if isinstance(asked, ApprovalAsked) else "",
        approver_issuer=asked.approver_issuer if isinstance(asked, ApprovalAsked) else "",
    )
