"""Actions that services do once: a service asks before it does something, and says afterwards what became of it.

Each is one transaction. A claim re-reads everything that the token hangs on, as introspection does, and the record of its step; a
settlement asks nothing of the task: what was done was done, whether or not the task lives. What a step's record says is decided in
:mod:`broker.tasks.action`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from broker.audit.events import Event
from broker.audit.records import Record
from broker.clock import Clock
from broker.errors import Conflict, Invalid, InvalidToken, NotFound, Refused
from broker.server import failpoints
from broker.server.store.ports import Store, Writer
from broker.server.tasks import action_records
from broker.server.tasks.admission import Starters, Vouching, admit_service, claim
from broker.server.tasks.answers import Answers, digest_of, spent
from broker.server.tasks.config import Audiences
from broker.server.tasks.ids import Ids
from broker.server.tasks.records import sha256
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.requests import Actor, check_key
from broker.server.tasks.tokens import TaskTokens
from broker.tasks import Task, TaskClaims
from broker.tasks.action import (
    MAX_PER_TASK,
    SETTLE_WITHIN,
    ActionRecord,
    ActionState,
    Claimed,
    Intent,
    effective_action_state,
    is_single_use,
    judge_claim,
    read_outcome,
    require_parameters,
    settle,
)
from broker.tasks.constraints import MAX_TEXT, MAX_VALUES
from broker.tasks.texts import ID


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """Do something once for whoever shows this token; raises Invalid. ``identifier`` and ``parameter_digest`` None: there are none.

    ``enforced`` names the limits of the task's authority that the service judges itself.
    """

    token: str = field(repr=False)
    action: str
    step: str
    identifier: str | None = None
    parameter_digest: str | None = None
    enforced: frozenset[str] = frozenset()
    idempotency_key: str = ""

    def __post_init__(self) -> None:
        """Check what is not checked where it is used."""
        if not self.token:
            raise Invalid("the token is missing", code="token_missing")
        if len(self.enforced) > MAX_VALUES or any(len(name) > MAX_TEXT for name in self.enforced):
            raise Invalid(f"enforced is not at most {MAX_VALUES} names of limits", code="invalid_enforced")
        check_key(self.idempotency_key)

    def intent(self, claims: TaskClaims) -> Intent:
        """Give what its step stands for, at the audience of the token; raises Invalid."""
        return Intent(
            audience=claims.aud,
            action=self.action,
            step=self.step,
            identifier=self.identifier,
            parameter_digest=self.parameter_digest,
        )

    def digest(self) -> str:
        """Give the digest of what is asked."""
        parts = (sha256(self.token.encode()), self.action, self.step, self.identifier, self.parameter_digest)
        return digest_of("claim", None, *parts, *sorted(self.enforced))


@dataclass(frozen=True, slots=True)
class SettleRequest:
    """Say what became of an action; raises Invalid. ``outcome`` is a JSON text, empty for none, and kept in canonical form."""

    action_id: str
    state: ActionState
    outcome: str | None = None

    def __post_init__(self) -> None:
        """Check each field."""
        if ID.fullmatch(self.action_id) is None:
            raise action_unknown()
        object.__setattr__(self, "outcome", read_outcome(self.outcome or ""))

    @classmethod
    def parse(cls, action_id: str, state: str, outcome: str) -> "SettleRequest":
        """Read what a door was sent; raises Invalid, NotFound."""
        try:
            return cls(action_id, ActionState(state), outcome)
        except ValueError:
            raise Invalid("an action is settled as completed or released", code="invalid_settlement") from None


@dataclass(frozen=True, slots=True)
class ClaimedAction:
    """The answer to a claim: whether the service does it now, and the action, with its outcome where it was done before."""

    result: Claimed
    record: ActionRecord


class Actions:
    """Lets services claim and settle actions, for both doors."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        tokens: TaskTokens,
        audiences: Audiences,
        vouching: Vouching,
        starters: Starters,
        ids: Ids,
        refusals: Refusals,
        count: Callable[[str], None] | None = None,
    ) -> None:
        """``count`` is told the result of each claim that was not refused."""
        self._store = store
        self._clock = clock
        self._tokens = tokens
        self._audiences = audiences
        self._vouching = vouching
        self._starters = starters
        self._ids = ids
        self._refusals = refusals
        self._count = count

    async def claim(self, actor: Actor, asked: ClaimRequest) -> ClaimedAction:
        """Let a service do something once, or tell it that it was done before.

        Raises:
            Invalid: the token is not ours, or what is asked is malformed.
            Refused: the token is not this service's to judge, is not alive or was used; its authority does not reach so far; or
                nobody knows whether it was done (``action_indeterminate``).
            Conflict: it is done at this moment, or the step stands for something else.
        """
        async with self._refusals.recorded(Event.ACTION_REFUSED, actor, ""):
            claims = self._tokens.verify(asked.token)
        told = action_records.asked_for(claims, actor)
        async with self._refusals.recorded(Event.ACTION_REFUSED, actor, claims.task.id, told=told):
            self._require_owner(actor, claims)
            intent = asked.intent(claims)
        told = action_records.asked_for(claims, actor, intent)
        async with self._refusals.recorded(Event.ACTION_REFUSED, actor, claims.task.id, told=told):
            claims.authorization_details.require(
                intent.action, intent.audience, intent.identifier, enforced=asked.enforced
            )
            require_parameters(claims, intent)
            answer = await self._store.write(lambda writer: self._claim(writer, actor, asked, claims, intent))
        failpoints.reach("actions.after_claim")
        if self._count is not None:
            self._count(answer.result.value)
        return answer

    async def settle(self, actor: Actor, asked: SettleRequest) -> ActionRecord:
        """Take down what became of an action, also of one in doubt; to say the same twice is fine.

        Raises:
            NotFound: there is no such action.
            Refused: another service claimed it.
            Conflict: it was settled otherwise.
        """
        told = {"action_id": asked.action_id, "service": str(actor.spiffe_id)}
        async with self._refusals.recorded(Event.ACTION_REFUSED, actor, asked.action_id, told=told):
            return await self._store.write(lambda writer: self._settle(writer, actor, asked))

    def _require_owner(self, actor: Actor, claims: TaskClaims) -> None:
        """Refuse a token that is for somebody else's service, by the same rule as at introspection."""
        audience = self._audiences.find(claims.aud)
        if actor.spiffe_id not in audience.introspectors:
            raise Refused(
                "the token is for a service that is not the caller's",
                code="audience_not_own",
                hint="an operator names the service under introspectors of its audience",
            )
        if claims.cnf is None and not audience.takes_bearer:
            raise InvalidToken("the token is bound to nobody", code="token_claim_missing")

    def _claim(
        self, writer: Writer, actor: Actor, asked: ClaimRequest, claims: TaskClaims, intent: Intent
    ) -> ClaimedAction:
        now = self._clock.now()
        caller = admit_service(writer, claim(actor, self._vouching, self._starters), now)
        task = writer.task(claims.task.id)
        if task is None or not self._tokens.is_alive(writer, claims, now):
            raise Refused(
                "the token is not alive", code="token_not_alive", hint="the agent asks for a new one, if it may"
            )
        answers = Answers(writer, owner=caller.owner, key=asked.idempotency_key, digest=asked.digest(), now=now)
        kept = answers.recall()
        if kept is not None:
            return _claimed_before(writer, kept)
        if is_single_use(claims):
            writer.use_token(claims.jti, task.id, now)
        answer = self._judged(writer, claims, intent, actor, now)
        writer.record(_told(answer, claims, task, actor, now))
        answers.keep(f"{answer.result} {answer.record.id}")
        failpoints.reach("actions.before_commit")
        return answer

    def _judged(self, writer: Writer, claims: TaskClaims, intent: Intent, actor: Actor, now: datetime) -> ClaimedAction:
        """Judge a claim by what is known of its step, and write it down where the service does it now."""
        known = writer.action_at(claims.task.id, intent.audience, intent.step)
        if known is not None and judge_claim(known, intent, now) is Claimed.DUPLICATE:
            return ClaimedAction(Claimed.DUPLICATE, known)
        record = ActionRecord(
            # Of this claim alone: what comes late of an earlier one settles nothing.
            id=self._ids.new("act", now),
            task=claims.task.id,
            root=claims.task.root,
            service=actor.spiffe_id,
            intent=intent,
            jti=claims.jti,
            claimed_at=now,
            settle_by=now + SETTLE_WITHIN,
        )
        if known is not None:
            writer.replace_action(record, known)
        else:
            _require_room(writer, record.task)
            writer.add_action(record)
        return ClaimedAction(Claimed.NOW, record)

    def _settle(self, writer: Writer, actor: Actor, asked: SettleRequest) -> ActionRecord:
        now = self._clock.now()
        admit_service(writer, claim(actor, self._vouching, self._starters), now)
        known = writer.action(asked.action_id)
        task = None if known is None else writer.task(known.task)
        if known is None or task is None:
            raise action_unknown()
        over = settle(known, actor.spiffe_id, asked.state, asked.outcome, now)
        if over is not known:
            writer.replace_action(over, known)
            prior = effective_action_state(known, now)
            writer.record(action_records.action_settled(over, prior, task, actor, now))
        return over


def action_unknown() -> NotFound:
    """Give the answer for an action that is not there, or not there any more."""
    return NotFound(
        "there is no such action", code="action_unknown", hint="it was claimed anew, or its task is long over"
    )


def _require_room(writer: Writer, task_id: str) -> None:
    if writer.actions_of(task_id) >= MAX_PER_TASK:
        raise Conflict(
            f"the task has done {MAX_PER_TASK} actions", code="too_many_actions", hint="start another task for more"
        )


def _claimed_before(writer: Writer, kept: str) -> ClaimedAction:
    """Give the answer of before to a request that was repeated; Conflict where the claim is not there any more."""
    result, _, action_id = kept.partition(" ")
    record = writer.action(action_id)
    if record is None:
        raise spent()
    return ClaimedAction(Claimed(result), record)


def _told(answer: ClaimedAction, claims: TaskClaims, task: Task, actor: Actor, now: datetime) -> Record:
    if answer.result is Claimed.DUPLICATE:
        return action_records.action_suppressed(answer.record, claims, task, actor, now)
    return action_records.action_claimed(answer.record, task, actor, now)
