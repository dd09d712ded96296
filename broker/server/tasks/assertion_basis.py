"""What a transaction token or a grant stands on: a task of the caller's own, or a token that it holds and may bring.

Judged inside the transaction that grants something. Who may not bring a token is told so before anything is said of the token itself.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from broker.errors import PolicyDenied, Refused
from broker.server.store.ports import Writer
from broker.server.tasks import records
from broker.server.tasks.admission import Admitted, Caller, Claim, admit, admit_requester
from broker.server.tasks.assertion_requests import AssertionRequest, GrantRequest, OwnTask, TransactionRequest
from broker.server.tasks.config import Audiences
from broker.server.tasks.decision import own_task, require_same_user
from broker.server.tasks.ids import Ids
from broker.server.tasks.outward import RemoteServers, TransactionRules
from broker.server.tasks.policy.asked import Action
from broker.server.tasks.requests import Actor, Door
from broker.server.tasks.subjects import Subject
from broker.server.tasks.tokens import TaskTokens
from broker.server.tasks.user_leases import go_on_above
from broker.tasks import Authority, Confirmation, Resource, Task, TaskClaims, lineage_epoch
from broker.tasks.transactions import TransactionClaims


@dataclass(frozen=True, slots=True)
class Asked:
    """A request whose subject was read, before the transaction: nothing is granted by it yet."""

    actor: Actor
    request: AssertionRequest
    claimed: Claim | None = None
    user: Subject | None = None
    token: TaskClaims | None = None
    transaction: TransactionClaims | None = None

    @property
    def subject_hash(self) -> str | None:
        """Give the hash of the token that was brought; None where none was."""
        subject = self.request.subject
        return None if isinstance(subject, OwnTask) else records.sha256(subject.token.encode())


@dataclass(frozen=True, slots=True)
class Basis:
    """What the token stands on: the task with its ancestors, root first, its agent, and the ceiling of what may be said."""

    caller: Caller
    admitted: Admitted
    lineage: tuple[Task, ...]
    resource: Resource
    ceiling: Authority | None
    ends: tuple[datetime, ...]
    txn: str
    epoch: int


class Bases:
    """Finds them."""

    def __init__(
        self,
        *,
        tokens: TaskTokens,
        ids: Ids,
        audiences: Audiences,
        transactions: TransactionRules,
        remotes: RemoteServers,
    ) -> None:
        self._tokens = tokens
        self._ids = ids
        self._audiences = audiences
        self._transactions = transactions
        self._remotes = remotes

    def find(self, writer: Writer, asked: Asked, now: datetime) -> Basis:
        """Judge the subject by the rows of this moment; raises Refused, PolicyDenied, NotFound."""
        if asked.token is not None:
            return self._held(writer, asked, asked.token, now)
        if asked.transaction is not None:
            return self._handed_on(writer, asked, asked.transaction, now)
        assert asked.claimed is not None
        assert isinstance(asked.request.subject, OwnTask)
        admitted = admit(writer, asked.claimed, now)
        lineage = writer.lineage(asked.request.subject.task_id)
        task = own_task(lineage, admitted)
        if asked.user is not None:
            require_same_user(task, asked.user)
            if self._tokens.standing.hear(writer, asked.user, now):
                lineage = go_on_above(writer, lineage, self._tokens.standing, self._tokens.rules, now)
        resource = self._resource(asked.request)
        epoch = lineage_epoch(lineage)
        return Basis(admitted, admitted, lineage, resource, None, (), self._ids.new("txn", now), epoch)

    def _resource(self, request: AssertionRequest) -> Resource:
        if isinstance(request, GrantRequest):
            return self._remotes.find(request.audience, request.format).resource_of(request.resource)
        if request.resource is None:
            raise PolicyDenied(
                "the transaction needs the resource that it begins at",
                code="invalid_target",
                hint="send resource, or a task token for it",
            )
        self._require_transactions(request.resource)
        return request.resource

    def _held(self, writer: Writer, asked: Asked, claims: TaskClaims, now: datetime) -> Basis:
        caller = admit_requester(writer, asked.actor, now)
        self._require_may_bring(asked.request, caller, claims)
        wanted = asked.request.resource
        if isinstance(asked.request, GrantRequest):
            wanted = self._resource(asked.request)
        if wanted is not None and wanted != claims.aud:
            raise PolicyDenied("the token is for another resource", code="invalid_target", hint="bring one for it")
        if not self._tokens.is_alive(writer, claims, now):
            raise _subject_over()
        return self._of_row(writer, caller, claims, now)

    def _handed_on(self, writer: Writer, asked: Asked, claims: TransactionClaims, now: datetime) -> Basis:
        caller = admit_requester(writer, asked.actor, now)
        if asked.actor.spiffe_id not in self._transactions.replacers:
            raise _may_not_bring()
        alive = self._tokens.lives(
            writer,
            claims.jti,
            claims.authorization_details,
            task_id=claims.task,
            epoch=claims.epoch,
            exp=claims.exp,
            now=now,
            action=Action.TRANSACTION,
        )
        if not alive:
            raise _subject_over()
        basis = self._of_row(writer, caller, claims, now)
        self._require_transactions(basis.resource)
        return basis

    def _of_row(self, writer: Writer, caller: Caller, brought: TaskClaims | TransactionClaims, now: datetime) -> Basis:
        """Stand on a token that lives: its agent is admitted as its row and its entry say, for it is not here itself."""
        row = writer.token(brought.jti)
        entry = None if row is None else self._tokens.standing_entry(writer, row, now)
        if row is None or entry is None:
            raise _subject_over()
        agent = Actor(row.agent, row.x5t or "", row.expires_at, Door.HTTPS, row.session, entry.id)
        return Basis(
            caller=caller,
            admitted=Admitted(agent, row.session, entry),
            lineage=writer.lineage(row.task_id),
            resource=Resource(row.resource),
            ceiling=brought.authorization_details,
            ends=(_moment(brought.exp),),
            txn=brought.txn,
            epoch=brought.epoch if isinstance(brought, TransactionClaims) else brought.task.epoch,
        )

    def _require_may_bring(self, request: AssertionRequest, caller: Caller, claims: TaskClaims) -> None:
        """Refuse who neither holds the token nor is named by its audience, before anything is said of the token."""
        holds = caller.actor.spiffe_id == claims.client_id and _holds(caller, claims.cnf)
        audience = self._audiences.find(claims.aud)
        named = isinstance(request, TransactionRequest) and caller.actor.spiffe_id in audience.transaction_requesters
        if not holds and not named:
            raise _may_not_bring()
        if isinstance(request, TransactionRequest):
            self._require_transactions(claims.aud)

    def _require_transactions(self, resource: Resource) -> None:
        if not self._audiences.find(resource).transactions:
            raise PolicyDenied(
                "tokens for this audience do not become transaction tokens",
                code="invalid_target",
                hint="an operator sets transactions = true on the audience",
            )


def _holds(caller: Caller, cnf: Confirmation | None) -> bool:
    """Tell whether a workload has what its token is bound to; a token that is bound to nobody is its workload's."""
    if cnf is None:
        return True
    if cnf.jkt is not None:
        # As at every verifier: a session that stands beside a key says when it ends, and not who holds it.
        return caller.actor.jkt == cnf.jkt
    if caller.actor.x5t == cnf.x5t:
        return True
    return cnf.session is not None and caller.session == cnf.session


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _may_not_bring() -> Refused:
    # The same words whether the token lives or not: who may not bring it learns nothing of it.
    return Refused(
        "this workload may not bring that token",
        code="subject_not_held",
        hint="its holder may, or a workload that an operator names",
    )


def _subject_over() -> Refused:
    return Refused("the subject token is over", code="subject_over", hint="its task has ended, or it was revoked")
