"""Approvals, for who decides: shown to those who may, decided by a person in a session of their own, and taken back.

Invariants: a yes comes from a verified user's token that the issuer gave to a client which is there for that (``approval_clients``),
shortly after the user signed in; never from whom it is done for, never from who the policy does not name. Operators can say no and take
a yes back, and never say yes: they are not people that a record could name. Everything is asked again when a yes is used
(:mod:`broker.server.tasks.approved`).
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from broker.clock import Clock
from broker.errors import BrokerError, Invalid, NotFound, Refused, Unavailable
from broker.server.store.approval_ports import ApprovalFilter, ApprovalPage
from broker.server.store.ports import Reader, Store, Writer
from broker.server.tasks import approval_records
from broker.server.tasks.approved import may_decide
from broker.server.tasks.lifecycle import revoke_token
from broker.server.tasks.people import Capacity, People
from broker.server.tasks.policy.rules import Rules
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.standing import Standing
from broker.server.tasks.subjects import Subject, Subjects
from broker.tasks import require_lineage_active
from broker.tasks.approval import Approval, ApprovalState, Verdict, decide, require_other, withdraw
from broker.tasks.texts import ID, check_purpose

USE_WITHIN: Final = 300
"""Seconds in which a yes may be used, where the person says nothing: the agent asks every few seconds."""
MAX_USE_WITHIN: Final = 3600
"""Longest time, in seconds: what a person saw an hour ago is another situation."""


@dataclass(frozen=True, slots=True)
class Saying:
    """What a person says: about which approval, and why; ``use_within`` are the seconds in which a yes may be used, 0 the usual."""

    approval_id: str
    reason: str = ""
    use_within: int = 0

    def __post_init__(self) -> None:
        """Check each field; raises Invalid, NotFound for what is no approval's id."""
        if ID.fullmatch(self.approval_id) is None:
            raise unknown()
        if self.reason:
            check_purpose(self.reason)
        if not 0 <= self.use_within <= MAX_USE_WITHIN:
            raise Invalid(f"use_within is not 0 to {MAX_USE_WITHIN} seconds", code="invalid_approval")


CAPACITY: Final = Capacity(
    clients=lambda issuer: issuer.approval_clients,
    max_age=lambda issuer: issuer.approval_max_age,
    stranger=lambda: Refused(
        "a token of this client decides no approvals",
        code="approval_client",
        hint="only a client named in approval_clients under [[server.subjects]] does: never an agent's",
    ),
)


class Approvals:
    """The use cases, for every door."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        subjects: Subjects,
        standing: Standing,
        refusals: Refusals,
        rules: Rules,
    ) -> None:
        self._store = store
        self._clock = clock
        self._people = People(subjects, clock, CAPACITY, self._note)
        self._standing = standing
        self._refusals = refusals
        self._rules = rules

    # ---- for people, each by a token of their own; ``by`` is who brings it, where known

    async def waiting(self, token: str, *, after: str | None = None, limit: int = 100, by: str = "") -> ApprovalPage:
        """Give a page of what this person may decide now, oldest first; it may hold fewer than ``limit`` and go on.

        Raises as :meth:`approve`, and Invalid for a page token that is not ours.
        """

        async def page(subject: Subject) -> ApprovalPage:
            def query(reader: Reader) -> ApprovalPage:
                now = self._clock.now()
                self._standing.require_signed_in(reader, subject, now)
                wanted = ApprovalFilter(now=now, state=ApprovalState.PENDING)
                found = reader.list_approvals(wanted, after=after, limit=limit)
                mine = tuple(one for one in found.approvals if self._decides(reader, one, subject))
                return ApprovalPage(mine, found.next)

            return await self._store.read(query)

        return await self._people.act(token, page, by=by)

    async def shown(self, token: str, approval_id: str, *, by: str = "") -> Approval:
        """Give one to whom it is done for, to who decided it and to who may; NotFound to everybody else."""

        async def found(subject: Subject) -> Approval:
            return await self._store.read(lambda reader: self._visible(reader, Saying(approval_id), subject))

        return await self._people.act(token, found, by=by)

    async def approve(self, token: str, saying: Saying, *, by: str = "") -> Approval:
        """Say yes; saying it twice is fine.

        Raises:
            InvalidToken: the token does not verify.
            NotFound: there is no such approval, or this person may not decide it.
            Refused: the sign-in is too long ago, a session is over, or nobody decided in time.
            PolicyDenied: it is done for this very person (``approver_is_requester``).
            Conflict: it was decided otherwise.
        """

        async def approved(subject: Subject) -> Approval:
            return await self._store.write(lambda writer: self._approve(writer, subject, saying))

        return await self._people.act(token, approved, by=by, fresh=True)

    async def deny(self, token: str, saying: Saying, *, by: str = "") -> Approval:
        """Say no; also whom it is done for may. Raises as :meth:`approve`."""

        async def denied(subject: Subject) -> Approval:
            def act(writer: Writer) -> Approval:
                known = self._visible(writer, saying, subject)
                return self._decided(writer, known, Verdict.DENY, by=subject.user, reason=saying.reason)

            return await self._store.write(act)

        return await self._people.act(token, denied, by=by)

    async def withdraw(self, token: str, saying: Saying, *, by: str = "") -> Approval:
        """Take back a yes: what it permitted is dead at once. Raises as :meth:`approve`; Conflict where there was no yes."""

        async def withdrawn(subject: Subject) -> Approval:
            def act(writer: Writer) -> Approval:
                known = self._visible(writer, saying, subject)
                return self._withdrawn(writer, known, by=subject.user, reason=saying.reason)

            return await self._store.write(act)

        return await self._people.act(token, withdrawn, by=by)

    async def refused(self, error: BrokerError, *, user: str = "", by: str = "") -> None:
        """Record that somebody was refused here; ``user`` empty: it is not known who. A store that is away refused nobody."""
        if isinstance(error, Unavailable):
            return
        now, who = self._clock.now(), by or user or "anonymous"
        await self._refusals.note(lambda _: approval_records.refused(user, error.reason, who, now))

    # ---- for operators

    async def get(self, approval_id: str) -> Approval:
        """Give one; raises NotFound."""
        return await self._store.read(lambda reader: _known(reader, Saying(approval_id)))

    async def list(
        self,
        *,
        state: ApprovalState | None = None,
        user: str = "",
        task: str = "",
        after: str | None = None,
        limit: int = 100,
    ) -> ApprovalPage:
        """Give a page of all, oldest first; raises Invalid."""
        wanted = ApprovalFilter(now=self._clock.now(), state=state, user=user, task=task)
        return await self._store.read(lambda reader: reader.list_approvals(wanted, after=after, limit=limit))

    async def stop(self, saying: Saying, *, by: str) -> Approval:
        """Say no because an operator does: deny what waits, take back what was given; twice is fine. Raises NotFound, Conflict."""

        def act(writer: Writer) -> Approval:
            known = _known(writer, saying)
            if known.state in (ApprovalState.PENDING, ApprovalState.DENIED):
                return self._decided(writer, known, Verdict.DENY, by=by, reason=saying.reason)
            return self._withdrawn(writer, known, by=by, reason=saying.reason)

        return await self._store.write(act)

    # ---- inside

    async def _note(self, error: BrokerError, user: str, by: str) -> None:
        await self.refused(error, user=user, by=by)

    def _approve(self, writer: Writer, subject: Subject, saying: Saying) -> Approval:
        now = self._clock.now()
        # Heard first: a sign-in that was ended decides nothing, and the session is one that is known from now on.
        self._standing.hear(writer, subject, now)
        known = _known(writer, saying)
        # Before it is asked who may: nobody is told "no such approval" of their own.
        require_other(known, subject.delegation())
        if not self._decides(writer, known, subject):
            raise unknown()
        lineage = writer.lineage(known.wanted.task)
        require_lineage_active(lineage[-1], tuple(reversed(lineage[:-1])), now)
        self._standing.require(writer, lineage[-1].delegation, now)
        until = min(now + timedelta(seconds=saying.use_within or USE_WITHIN), lineage[-1].expires_at)
        decided = decide(
            known,
            Verdict.APPROVE,
            by=subject.user,
            now=now,
            approver=subject.delegation(),
            until=until,
            reason=saying.reason,
        )
        return self._written(writer, known, decided)

    def _decided(self, writer: Writer, known: Approval, verdict: Verdict, *, by: str, reason: str) -> Approval:
        return self._written(writer, known, decide(known, verdict, by=by, now=self._clock.now(), reason=reason))

    def _withdrawn(self, writer: Writer, known: Approval, *, by: str, reason: str) -> Approval:
        now = self._clock.now()
        over = self._written(writer, known, withdraw(known, by=by, now=now, reason=reason))
        row = None if over.jti is None else writer.token(over.jti)
        if over is not known and row is not None:
            revoke_token(writer, row, by=by, now=now, reason="approval_withdrawn")
        return over

    def _written(self, writer: Writer, known: Approval, decided: Approval) -> Approval:
        if decided is not known:
            writer.replace_approval(decided, was=known.state)
            writer.record(approval_records.decided(decided, self._clock.now()))
        return decided

    def _decides(self, reader: Reader, approval: Approval, subject: Subject) -> bool:
        """Tell whether the policy lets this person decide, and it is not done for them."""
        task = reader.task(approval.wanted.task)
        if task is None:
            return False
        try:
            require_other(approval, subject.delegation())
        except Refused:
            return False
        return may_decide(self._rules, task, approval, subject.delegation(), self._clock.now()).is_allowed

    def _visible(self, reader: Reader, saying: Saying, subject: Subject) -> Approval:
        # A token of a session that is over shows nothing and ends nothing, for as long as it would have been good.
        self._standing.require_signed_in(reader, subject, self._clock.now())
        found = _known(reader, saying)
        approver = found.approver
        is_theirs = (found.wanted.issuer, found.wanted.user) == (subject.issuer, subject.user)
        decided = approver is not None and (approver.issuer, approver.user) == (subject.issuer, subject.user)
        if not is_theirs and not decided and not self._decides(reader, found, subject):
            raise unknown()
        return found


def _known(reader: Reader, saying: Saying) -> Approval:
    found = reader.approval(saying.approval_id)
    if found is None:
        raise unknown()
    return found


def unknown() -> NotFound:
    """Give the one answer for an approval that is not there and for one that is not this person's to decide."""
    return NotFound("no such approval", code="approval_unknown")
