"""The exchange: a user's word and an agent's identity become a task, and a task's authority becomes a short-lived token.

The order is fixed (tokens.md 7.2): judge the user's token (the only step that may touch the network), then one transaction
that reads the clock, re-reads everything it relies on, decides and writes, then sign what was committed. A crash between
commit and signature leaves a counted token that nobody holds; a retry under the same idempotency key signs the same claims
again. What is decided is in ``decision``; what the wire looks like is the doors' business.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol

from broker.audit.events import Event
from broker.clock import Clock
from broker.errors import BrokerError, Invalid, InvalidToken, PolicyDenied, Unavailable
from broker.keys import Signer
from broker.server import failpoints
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import TokenRow
from broker.server.tasks import records
from broker.server.tasks.admission import Admitted, Claim, Starters, Vouching, admit, claim
from broker.server.tasks.answers import Answers, digest_of, spent
from broker.server.tasks.approved import Approving, Permission
from broker.server.tasks.bindings import token_type
from broker.server.tasks.decision import (
    Grant,
    Policy,
    decide_issue,
    decide_start,
    own_task,
    require_may_act,
    require_same_delegation,
    require_same_user,
)
from broker.server.tasks.delegated import Glances, IsAlive, Presented, attach, narrowed, resolve
from broker.server.tasks.ids import Ids
from broker.server.tasks.policy.decision import Decision
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.requests import Actor, IssuedToken, IssueRequest, StartRequest
from broker.server.tasks.standing import Standing, StandingWord
from broker.server.tasks.subjects import Subject, SubjectKind, Subjects
from broker.server.tasks.supervisor import begin_lease
from broker.server.tasks.user_leases import go_on_above
from broker.spiffe import jose
from broker.spiffe.jose import PublicKey
from broker.spiffe.strictjson import JsonValue
from broker.tasks import Resource, Task, TaskClaims, issue_claims, lineage_epoch
from broker.tasks.approval import ApprovalPending
from broker.tasks.verify import TOKEN_TYPE, verify_task_token

MAX_PAYLOAD: Final = 5632
"""Largest payload, in bytes: signed it stays below the 8 KiB that verifiers take."""
TASK_CHANGE: Final = "task"
"""The change log's word for a task that came or changed."""

_WRITER: Final = json.JSONEncoder(separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class _Committed:
    """A token that is in the store: the text of its payload is all that is needed to sign it, now or again."""

    claims: TaskClaims
    text: str


class TaskKeys(Protocol):
    """The task-token keys of this moment."""

    def task_signer(self) -> Signer:
        """Give the key that signs, its ``id`` being the ``kid``; Unavailable before the first is published."""
        ...

    def task_keys(self) -> Mapping[str, PublicKey]:
        """Give every published key by its ``kid``."""
        ...


class Exchange:
    """Starts tasks and issues their tokens, for both doors."""

    def __init__(
        self,
        *,
        store: Store,
        subjects: Subjects,
        keys: TaskKeys,
        vouching: Vouching,
        starters: Starters,
        clock: Clock,
        ids: Ids,
        refusals: Refusals,
        policy: Policy,
        is_alive: IsAlive,
        issuer: str,
        standing: Standing | None = None,
        count: Callable[[str, str], None] | None = None,
    ) -> None:
        """``is_alive`` judges a token of ours that is shown as a subject; ``issuer`` is the ``iss`` of every token.

        ``count`` is told (``issued`` or ``refused``, the code) of each exchange.
        """
        self._store = store
        self._subjects = subjects
        self._keys = keys
        self._vouching = vouching
        self._starters = starters
        self._clock = clock
        self._ids = ids
        self._refusals = refusals
        self._policy = policy
        self._is_alive = is_alive
        self._issuer = issuer
        self._standing = standing or Standing()
        self._approving = Approving(policy.rules, self._standing, ids)
        self._count = count
        self._glances = Glances(issuer)

    async def start(self, actor: Actor, request: StartRequest) -> Task:
        """Start a task on a user's word; the same request under the same idempotency key gives the same task.

        Raises:
            Refused: the workload, its session or its entry may not, or the user's word is over.
            PolicyDenied: authority, audience or a limit says no.
            InvalidToken: the user's token does not verify.
            Conflict: the idempotency key was used for another request.
        """
        async with self._refusals.recorded(Event.TASK_REFUSED, actor, ""):
            claimed = claim(actor, self._vouching, self._starters)
            subject = await self._presented(request)
            return await self._store.write(lambda writer: self._start(writer, claimed, subject, request))

    async def issue(self, actor: Actor, request: IssueRequest) -> IssuedToken:
        """Issue one token of a running task; raises as :meth:`start`, and NotFound for a task that is not the actor's."""
        async with self._counted(actor, request.task_id):
            claimed = claim(actor, self._vouching, self._starters)
            shown: Subject | Presented | None = None
            if self.is_own(request.user_token):
                shown = self._own_token(request)
            elif request.user_token:
                shown = await self._subjects.verify(request.user_token, request.kind)
            committed = await self._store.write(lambda writer: self._issue(writer, claimed, shown, request))
            if isinstance(committed, ApprovalPending):
                raise committed
            return self._sign(committed)

    def is_own(self, token: str) -> bool:
        """Tell whether a token says that it is one of ours: as a subject it leads to the task behind it, not to a new one."""
        return bool(token) and self._glances.at(token).is_own

    def names_actor(self, token: str) -> bool:
        """Tell whether a token says in ``may_act`` who may act on it."""
        return self._glances.at(token).names_actor

    async def start_and_issue(self, actor: Actor, start: StartRequest, issue: IssueRequest) -> IssuedToken:
        """Start a task and issue its first token in one transaction: the one-step exchange of RFC 8693."""
        async with self._counted(actor, issue.resource.text):
            claimed = claim(actor, self._vouching, self._starters)
            subject = await self._presented(start)
            committed = await self._store.write(lambda writer: self._both(writer, claimed, subject, start, issue))
            return self._sign(committed)

    async def _presented(self, request: StartRequest) -> Subject | None:
        """Judge the user's token; None where the request names a standing delegation, judged in the transaction."""
        return None if request.delegation_id else await self._subjects.verify(request.user_token, request.kind)

    # ---- inside the transaction

    def _start(self, writer: Writer, claimed: Claim, presented: Subject | None, request: StartRequest) -> Task:
        now = self._clock.now()
        admitted = admit(writer, claimed, now)
        subject = self._word(writer, admitted, presented, request, now)
        digest = digest_of("start", subject, *_parts(request))
        answers = Answers(writer, owner=admitted.owner, key=request.idempotency_key, digest=digest, now=now)
        if (kept := answers.recall()) is not None:
            known = writer.task(kept)
            if known is None:
                raise spent()
            self._policy.rules.may_begin(known).require()
            return known
        task = self._new_task(writer, admitted, subject, request, now)
        answers.keep(task.id)
        failpoints.reach("exchange.before_commit")
        return task

    def _own_token(self, request: IssueRequest) -> Presented:
        token = request.user_token
        if request.kind is SubjectKind.ID:
            raise Invalid("a task token is not an ID token", code="subject_token_type")
        now, keys = self._clock.now(), self._keys.task_keys()
        try:
            # Compared with itself: whom it was for is not what it is judged by here.
            audience = Resource(str(jose.parse_compact(token).payload.get("aud")))
        except InvalidToken:
            raise
        except Invalid:
            raise InvalidToken("the subject token is not a task token", code="token_audience") from None
        return Presented(verify_task_token(token, keys, issuer=self._issuer, audience=audience, now=now).claims)

    def _issue(
        self, writer: Writer, claimed: Claim, shown: Subject | Presented | None, request: IssueRequest
    ) -> _Committed | ApprovalPending:
        now = self._clock.now()
        admitted = admit(writer, claimed, now)
        presented = shown if isinstance(shown, Presented) else None
        subject = shown if isinstance(shown, Subject) else None
        if presented is not None:
            request = resolve(writer, self._is_alive, admitted, presented, request, now=now)
        lineage = writer.lineage(request.task_id)
        if subject is not None:
            require_may_act(subject, admitted)
            require_same_user(own_task(lineage, admitted), subject)
            if self._standing.hear(writer, subject, now):
                lineage = go_on_above(writer, lineage, self._standing, self._policy.rules, now)
        lineage = attach(writer, admitted, lineage, now)
        if subject is None and request.delegation_id:
            require_same_delegation(own_task(lineage, admitted), request.delegation_id)
        # The state is judged before the key: a repeated request gets nothing from a task that has ended since.
        if presented is None:
            grant = decide_issue(self._policy, admitted, lineage, request, now=now)
        else:
            grant = narrowed(self._policy, admitted, lineage, request, presented, now=now)
        self._require_standing(writer, lineage[-1], admitted, request, now)
        by = () if presented is None else (presented.claims.jti,)
        digest = request.idempotency_key and digest_of("issue", subject, request.task_id, *_token_parts(request), *by)
        answers = Answers(writer, owner=admitted.owner, key=request.idempotency_key, digest=digest, now=now)
        # The policy's no comes before what the key remembers: a repetition is told why.
        asked = self._approving.judge(lineage[-1], grant, now)
        kept = answers.recall_claims()
        issued = None if kept is None else TaskClaims.parse(kept).jti
        permission = self._approving.permit(writer, admitted, lineage, asked, now, issued=issued)
        if isinstance(permission, ApprovalPending):
            return permission
        if kept is not None:
            return _again(kept, lineage)
        committed = self._new_token(writer, admitted, lineage, permission, answers)
        failpoints.reach("exchange.before_commit")
        return committed

    def _both(
        self, writer: Writer, claimed: Claim, presented: Subject | None, start: StartRequest, issue: IssueRequest
    ) -> _Committed:
        now = self._clock.now()
        admitted = admit(writer, claimed, now)
        subject = self._word(writer, admitted, presented, start, now)
        digest = digest_of("both", subject, *_parts(start), *_token_parts(issue))
        answers = Answers(writer, owner=admitted.owner, key=start.idempotency_key, digest=digest, now=now)
        if (kept := answers.recall_claims()) is not None:
            lineage = writer.lineage(TaskClaims.parse(kept).task.id)
            grant = decide_issue(self._policy, admitted, lineage, issue, now=now)
            self._require_standing(writer, lineage[-1], admitted, issue, now)
            self._permitted(lineage[-1], grant, now)
            return _again(kept, lineage)
        task = self._new_task(writer, admitted, subject, start, now)
        grant = decide_issue(self._policy, admitted, (task,), issue, now=now)
        self._require_standing(writer, task, admitted, issue, now)
        # NOTE(security): where a person has to decide nothing begins: asked again, this request would be of another task.
        permission = Permission(grant, self._permitted(task, grant, now))
        committed = self._new_token(writer, admitted, (task,), permission, answers)
        failpoints.reach("exchange.before_commit")
        return committed

    def _word(
        self, writer: Writer, admitted: Admitted, presented: Subject | None, request: StartRequest, now: datetime
    ) -> Subject | StandingWord:
        """Give the user's word that a task starts on, if it counts at this moment."""
        if presented is not None:
            self._standing.hear(writer, presented, now)
            return presented
        return self._standing.recall(writer, request.delegation_id, admitted.actor.spiffe_id, now)

    def _require_standing(
        self, writer: Writer, task: Task, admitted: Admitted, request: IssueRequest, now: datetime
    ) -> None:
        agent, audience = admitted.actor.spiffe_id, request.resource
        self._standing.require(writer, task.delegation, now, agent=agent, audience=audience)

    def _new_task(
        self, writer: Writer, admitted: Admitted, subject: Subject | StandingWord, request: StartRequest, now: datetime
    ) -> Task:
        task_id = self._ids.new("tsk", now)
        task = decide_start(self._policy, admitted, subject, request, task_id=task_id, now=now)
        decision = self._policy.rules.may_begin(task).require()
        writer.add_task(task)
        writer.record(records.task_started(task, admitted.actor, admitted.entry.id, now, decision=decision))
        writer.change(TASK_CHANGE, task.id, task.state.value)
        begin_lease(writer, task)
        return task

    def _permitted(self, task: Task, grant: Grant, now: datetime) -> Decision:
        """Ask the operator's rules last: they see what would be granted, and can only narrow it; raises DeniedByPolicy."""
        return self._policy.rules.may_issue(task, grant.audience.resource, grant.authority, now).require()

    def _new_token(
        self,
        writer: Writer,
        admitted: Admitted,
        lineage: Sequence[Task],
        permission: Permission,
        answers: Answers,
    ) -> _Committed:
        """Write one token: what is committed is what will be signed."""
        task, grant, now = lineage[-1], permission.grant, answers.now
        claims = issue_claims(
            task,
            issuer=self._issuer,
            resource=grant.audience.resource,
            authority=grant.authority,
            cnf=grant.cnf,
            jti=self._ids.new("jti", now),
            txn=self._ids.new("txn", now),
            now=now,
            ttl=grant.ttl,
            not_after=grant.not_after,
            ancestors=tuple(reversed(lineage[:-1])),
            use=grant.use,
            parameter_digest=grant.parameter_digest,
        )
        text = payload_text(claims.to_payload())
        row = TokenRow(
            jti=claims.jti,
            task_id=task.id,
            root=task.root,
            resource=claims.aud.text,
            scope=claims.scope,
            agent=task.agent,
            session=admitted.session,
            x5t=None if claims.cnf is None else claims.cnf.x5t,
            issued_at=datetime.fromtimestamp(claims.iat, UTC),
            expires_at=datetime.fromtimestamp(claims.exp, UTC),
            hash=records.sha256(text.encode()),
        )
        writer.add_token(row)
        permission.used(writer, claims.jti, now)
        writer.record(
            records.token_issued(
                row, claims, admitted.actor, now, decision=permission.decision, approval=permission.approval_id
            )
        )
        answers.keep(text)
        return _Committed(claims, text)

    # ---- after the commit

    def _sign(self, committed: _Committed) -> IssuedToken:
        failpoints.reach("exchange.after_commit")
        signer, claims = self._keys.task_signer(), committed.claims
        header = {"alg": signer.algorithm, "kid": signer.id, "typ": TOKEN_TYPE}
        return IssuedToken(
            access_token=jose.sign_text(header, committed.text, signer.sign),
            issued_at=datetime.fromtimestamp(claims.iat, UTC),
            expires_at=datetime.fromtimestamp(claims.exp, UTC),
            scope=claims.scope,
            authority=claims.authorization_details,
            task_id=claims.task.id,
            jti=claims.jti,
            token_type=token_type(claims.cnf),
        )

    def _counted(self, actor: Actor, subject: str) -> AbstractAsyncContextManager[None]:
        return self._refusals.recorded(Event.TOKEN_REFUSED, actor, subject, self._tell)

    def _tell(self, error: BrokerError | None) -> None:
        if self._count is None:
            return
        if error is None:
            self._count("issued", "")
        else:
            self._count("unavailable" if isinstance(error, Unavailable) else "refused", error.reason)


def _again(kept: Mapping[str, JsonValue], lineage: tuple[Task, ...]) -> _Committed:
    claims = TaskClaims.parse(kept)
    if claims.task.epoch < lineage_epoch(lineage):
        # Suspended since: at verifiers it is dead.
        raise spent()
    return _Committed(claims, payload_text(kept))


def _parts(request: StartRequest) -> tuple[str | int | None, ...]:
    return request.authority.text(), request.purpose, request.ttl, request.supervision


def _token_parts(request: IssueRequest) -> tuple[str | int | None, ...]:
    binding = "bearer" if request.bearer else request.jkt
    authority = None if request.authority is None else request.authority.text()
    once = [request.parameter_digest] if request.parameter_digest else []
    return request.resource.text, request.scope, authority, *([binding] if binding else []), *once


def payload_text(payload: Mapping[str, JsonValue]) -> str:
    """Write the payload that will be signed; raises PolicyDenied for one that no verifier would take."""
    text = _WRITER.encode(payload)
    if len(text) > MAX_PAYLOAD:
        raise PolicyDenied(
            "the token would be too large",
            code="invalid_authorization_details",
            hint="ask for fewer details, or for those of one resource only",
        )
    return text
