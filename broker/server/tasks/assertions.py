"""Tokens that are no access tokens, of a task that lives: transactions inside the trust domain, grants for other servers.

The same road as the exchange takes: judge what may touch the network, then one transaction that admits, decides and writes, then
sign what was committed. A task token is taken from its own holder, or from whom the audience names; what it says is the
ceiling.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from broker.audit.events import Event
from broker.clock import Clock
from broker.errors import BrokerError, Unavailable
from broker.server import failpoints
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import TokenRow
from broker.server.tasks import records
from broker.server.tasks.admission import Starters, Vouching, claim
from broker.server.tasks.answers import Answers, digest_of
from broker.server.tasks.assertion_basis import Asked, Bases, Basis
from broker.server.tasks.assertion_requests import (
    TRANSACTION,
    AssertionRequest,
    GrantRequest,
    HeldToken,
    HeldTransaction,
    IssuedAssertion,
    OwnTask,
    TransactionRequest,
)
from broker.server.tasks.bindings import Bound
from broker.server.tasks.decision import Grant, Policy, decide_issue
from broker.server.tasks.exchange import TaskKeys, payload_text
from broker.server.tasks.ids import Ids
from broker.server.tasks.outward import RemoteServers, TransactionRules
from broker.server.tasks.policy.asked import Action
from broker.server.tasks.policy.decision import Decision
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.requests import Actor, IssueRequest
from broker.server.tasks.subjects import Subjects
from broker.server.tasks.tokens import TaskTokens
from broker.spiffe import jose
from broker.spiffe.strictjson import JsonValue
from broker.tasks import Authority, act_chain
from broker.tasks.grants import HEADER_TYPES, GrantClaims, GrantFormat
from broker.tasks.transactions import TOKEN_TYPE, TransactionClaims, lifetime, replace_transaction, verify_transaction

_AS_BROUGHT: Final = Bound(None, ends_with_svid=True)
"""A token that is brought was bound when it was issued, by certificate or key; what comes of it ends with it."""


@dataclass(frozen=True, slots=True)
class _Written:
    """A token that is in the store: all that is needed to sign it, now or again."""

    payload: Mapping[str, JsonValue]
    task_id: str


class Assertions:
    """Issues transaction tokens and grants."""

    def __init__(
        self,
        *,
        store: Store,
        subjects: Subjects,
        keys: TaskKeys,
        tokens: TaskTokens,
        vouching: Vouching,
        starters: Starters,
        clock: Clock,
        ids: Ids,
        refusals: Refusals,
        policy: Policy,
        issuer: str,
        transactions: TransactionRules,
        remotes: RemoteServers,
        count: Callable[[str, str], None] | None = None,
    ) -> None:
        """``count`` as of the exchange: what is issued here is an exchange as well."""
        self._store = store
        self._subjects = subjects
        self._keys = keys
        self._tokens = tokens
        self._vouching = vouching
        self._starters = starters
        self._clock = clock
        self._ids = ids
        self._refusals = refusals
        self._policy = policy
        self._issuer = issuer
        self._count = count
        self._bases = Bases(
            tokens=tokens, ids=ids, audiences=policy.audiences, transactions=transactions, remotes=remotes
        )
        self.transactions = transactions
        self.remotes = remotes

    async def issue(self, actor: Actor, request: AssertionRequest) -> IssuedAssertion:
        """Issue one token.

        Raises:
            Refused: the task, its agent or the requester may not, or is over.
            PolicyDenied: audience, authority or scope says no.
            InvalidToken: the subject token does not verify.
            NotFound: the task is not the caller's.
            Conflict: the idempotency key was used for another request.
        """
        async with self._counted(actor, request.audience):
            self._require_audience(request)
            asked = await self._read(actor, request)
            written = await self._store.write(lambda writer: self._write(writer, asked))
            return self._sign(request.kind, written)

    def _require_audience(self, request: AssertionRequest) -> None:
        if isinstance(request, GrantRequest):
            self.remotes.find(request.audience, request.format)
        else:
            self.transactions.require_ours(request.audience)

    async def _read(self, actor: Actor, request: AssertionRequest) -> Asked:
        match request.subject:
            case OwnTask() as own:
                claimed = claim(actor, self._vouching, self._starters)
                user = await self._subjects.verify(own.user_token, own.kind) if own.user_token else None
                return Asked(actor, request, claimed=claimed, user=user)
            case HeldToken(token):
                return Asked(actor, request, token=self._tokens.verify(token))
            case HeldTransaction(token):
                verified = verify_transaction(
                    token,
                    self._keys.task_keys(),
                    issuer=self._issuer,
                    trust_domain=self.transactions.trust_domain,
                    now=self._clock.now(),
                )
                return Asked(actor, request, transaction=verified.claims)

    # ---- inside the transaction

    def _write(self, writer: Writer, asked: Asked) -> _Written:
        now = self._clock.now()
        basis = self._bases.find(writer, asked, now)
        request = asked.request
        grant = self._decide(basis, request, now)
        agent, resource = basis.admitted.actor.spiffe_id, basis.resource
        self._tokens.standing.require(writer, basis.lineage[-1].delegation, now, agent=agent, audience=resource)
        decision = self._permitted(basis, request, grant, now)
        digest = digest_of(request.kind, asked.user, asked.subject_hash, *request.parts())
        answers = Answers(writer, owner=basis.caller.owner, key=request.idempotency_key, digest=digest, now=now)
        task = basis.lineage[-1]
        if (kept := answers.recall_claims()) is not None:
            return _Written(kept, task.id)
        jti = self._ids.new("jti", now)
        if isinstance(request, GrantRequest):
            payload, hop = self._grant(basis, request, grant, jti, now)
        else:
            payload, hop = self._transaction(basis, asked, grant, jti, now)
        text = payload_text(payload)
        row = _row(basis, payload, records.sha256(text.encode()))
        writer.add_token(row)
        writer.record(
            records.assertion_issued(
                row, request.kind, asked.actor,
                audience=request.audience, user=task.user, txn=str(payload["txn"]), hop=hop, subject_hash=asked.subject_hash, at=now,
                decision=decision,
            )
        )  # fmt: skip
        answers.keep(text)
        failpoints.reach("exchange.before_commit")
        return _Written(payload, task.id)

    def _decide(self, basis: Basis, request: AssertionRequest, now: datetime) -> Grant:
        wanted = request.authority
        if basis.ceiling is not None:
            wanted = basis.ceiling if wanted is None else basis.ceiling.narrow(wanted)
        actor = basis.admitted.actor
        jkt = "" if actor.x5t else actor.jkt
        issue = IssueRequest(basis.resource, basis.lineage[-1].id, scope=request.scope, authority=wanted, jkt=jkt)
        bound = None if basis.ceiling is None else _AS_BROUGHT
        return decide_issue(self._policy, basis.admitted, basis.lineage, issue, now=now, bound=bound)

    def _permitted(self, basis: Basis, request: AssertionRequest, grant: Grant, now: datetime) -> Decision:
        """Ask the operator's rules last, as the exchange does; raises DeniedByPolicy."""
        action = Action.GRANT if isinstance(request, GrantRequest) else Action.TRANSACTION
        return self._policy.rules.may_issue(basis.lineage[-1], basis.resource, grant.authority, now, action).require()

    def _transaction(
        self, basis: Basis, asked: Asked, grant: Grant, jti: str, now: datetime
    ) -> tuple[dict[str, JsonValue], int]:
        requester, request = asked.actor.spiffe_id, asked.request
        assert isinstance(request, TransactionRequest)
        if asked.transaction is not None:
            claims = replace_transaction(
                asked.transaction, requester,
                authority=request.authority, scope=request.scope, tctx=request.request_details, rctx=request.request_context,
                jti=jti, now=now, ends=(*grant.not_after, *basis.ends),
            )  # fmt: skip
            return claims.to_payload(), len(claims.txn_path)
        task = basis.lineage[-1]
        authority = grant.authority.for_resource(basis.resource)
        ttl = min(self.transactions.ttl, grant.ttl)
        iat, exp = lifetime(now, ttl, (*grant.not_after, *basis.ends))
        claims = TransactionClaims(
            iss=self._issuer,
            aud=self.transactions.trust_domain,
            iat=iat,
            exp=exp,
            jti=jti,
            txn=basis.txn,
            sub=task.user,
            scope=authority.scope(),
            act=act_chain(task, tuple(reversed(basis.lineage[:-1]))),
            authorization_details=authority,
            task=task.id,
            root=task.root,
            epoch=basis.epoch,
            txn_path=(requester,),
            tctx=request.request_details,
            rctx=request.request_context,
        )
        return claims.to_payload(), 1

    def _grant(
        self, basis: Basis, request: GrantRequest, grant: Grant, jti: str, now: datetime
    ) -> tuple[dict[str, JsonValue], int]:
        server = self.remotes.find(request.audience, request.format)
        task = basis.lineage[-1]
        act = act_chain(task, tuple(reversed(basis.lineage[:-1])))
        iat, exp = lifetime(now, server.ttl, (*grant.not_after, *basis.ends))
        claims = GrantClaims(
            iss=self._issuer,
            aud=server.issuer,
            client_id=server.client_of(task.agent),
            resource=basis.resource,
            authority=grant.authority.for_resource(basis.resource),
            jti=jti,
            txn=basis.txn,
            iat=iat,
            exp=exp,
        )
        return claims.to_payload(task, act), len(act)

    # ---- after the commit

    def _sign(self, kind: str, written: _Written) -> IssuedAssertion:
        failpoints.reach("exchange.after_commit")
        signer, payload = self._keys.task_signer(), written.payload
        typ = TOKEN_TYPE if kind == TRANSACTION else HEADER_TYPES[GrantFormat(kind)]
        return IssuedAssertion(
            token=jose.sign_compact({"alg": signer.algorithm, "kid": signer.id, "typ": typ}, payload, signer.sign),
            kind=kind,
            issued_at=_moment(jose.numeric_date(payload, "iat", required=True)),
            expires_at=_moment(jose.numeric_date(payload, "exp", required=True)),
            scope=str(payload["scope"]),
            authority=Authority.parse(payload["authorization_details"]),
            task_id=written.task_id,
        )

    @asynccontextmanager
    async def _counted(self, actor: Actor, audience: str) -> AsyncIterator[None]:
        outcome, reason = "issued", ""
        try:
            async with self._refusals.recorded(Event.TOKEN_REFUSED, actor, audience):
                yield
        except BrokerError as error:
            outcome, reason = "unavailable" if isinstance(error, Unavailable) else "refused", error.reason
            raise
        finally:
            if self._count is not None:
                self._count(outcome, reason)


def _row(basis: Basis, payload: Mapping[str, JsonValue], digest: str) -> TokenRow:
    """Keep it as a token of its task and of the task's agent: what ends them ends it."""
    task = basis.lineage[-1]
    return TokenRow(
        jti=str(payload["jti"]),
        task_id=task.id,
        root=task.root,
        resource=basis.resource.text,
        scope=str(payload["scope"]),
        agent=task.agent,
        session=basis.admitted.session,
        x5t=basis.admitted.actor.x5t or None,
        issued_at=_moment(jose.numeric_date(payload, "iat", required=True)),
        expires_at=_moment(jose.numeric_date(payload, "exp", required=True)),
        hash=digest,
    )


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
