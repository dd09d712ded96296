"""Standing delegations: made, shown and withdrawn by the user who gives them, and by nobody for them.

Invariants: it is made by a token that the issuer gave to a client which is there for that (``delegation_clients``), shortly
after the user signed in; no identity of a workload makes one, whatever token it holds. Nothing in it goes beyond what the
token itself permits. Its end is one row, and a stop that ends its tasks.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from broker.clock import Clock
from broker.errors import BrokerError, Invalid, NotFound, PolicyDenied, Refused, Unavailable
from broker.server.store.ports import Reader, Store, Writer
from broker.server.store.user_rows import DelegationPage
from broker.server.tasks import user_records
from broker.server.tasks.answers import Answers, digest_of, spent
from broker.server.tasks.decision import Policy
from broker.server.tasks.ids import Ids
from broker.server.tasks.people import Capacity, People
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.requests import check_key, unmetered
from broker.server.tasks.standing import Standing
from broker.server.tasks.stops import Stopped, Stops, stop
from broker.server.tasks.subjects import Subject, Subjects
from broker.spiffe import strictjson
from broker.spiffe.strictjson import JsonValue
from broker.tasks import Authority, Cause
from broker.tasks.standing import AgentPattern, StandingDelegation, read_agents
from broker.tasks.stop import Stop, StopKind
from broker.tasks.task import MAX_ACT_DEPTH
from broker.tasks.texts import ID, check_purpose

MAX_LIFE: Final = 366 * 86400
"""Seconds: a year. What nobody has looked at for longer is nobody's wish any more."""
MAX_STANDING: Final = 100
"""Delegations of one user that stand at once: more can be looked through by nobody."""
PREFIX: Final = "dlg"

_MEMBERS: Final = frozenset({"agents", "authorization_details", "expires_in", "max_task_ttl", "max_hops", "purpose"})


@dataclass(frozen=True, slots=True)
class Terms:
    """What a user wants to leave standing; times in seconds, ``max_task_ttl`` 0 for the server's longest."""

    agents: tuple[AgentPattern, ...]
    authority: Authority
    expires_in: int
    purpose: str
    max_task_ttl: int = 0
    max_hops: int = 1

    def __post_init__(self) -> None:
        """Check each field; raises Invalid."""
        check_purpose(self.purpose)
        if not 1 <= self.expires_in <= MAX_LIFE:
            raise Invalid(f"expires_in is not 1 to {MAX_LIFE} seconds", code="invalid_delegation")
        if self.max_task_ttl < 0 or not 1 <= self.max_hops <= MAX_ACT_DEPTH:
            raise Invalid(f"max_task_ttl is negative, or max_hops not 1 to {MAX_ACT_DEPTH}", code="invalid_delegation")

    @classmethod
    def parse(cls, value: JsonValue) -> "Terms":
        """Read a JSON object; raises Invalid for an unknown or missing member."""
        if not isinstance(value, dict) or not value.keys() <= _MEMBERS:
            raise Invalid(
                "the delegation is no object, or has a member that is not known",
                code="invalid_delegation",
                hint="its members are " + ", ".join(sorted(_MEMBERS)),
            )
        missing = {"agents", "authorization_details", "expires_in", "purpose"} - value.keys()
        if missing:
            raise Invalid(f"the delegation has no {min(missing)}", code="invalid_delegation")
        purpose = value["purpose"]
        if not isinstance(purpose, str):
            raise Invalid("the purpose is not text", code="invalid_delegation")
        return cls(
            agents=read_agents(value["agents"]),
            authority=Authority.parse(value["authorization_details"]),
            expires_in=_whole(value["expires_in"]),
            purpose=purpose,
            max_task_ttl=_whole(value.get("max_task_ttl", 0)),
            max_hops=_whole(value.get("max_hops", 1)),
        )

    def digest(self, subject: Subject) -> str:
        """Give the digest of the request, for its idempotency key."""
        agents = strictjson.canonical([pattern.text for pattern in self.agents]).decode()
        numbers = (self.expires_in, self.max_task_ttl, self.max_hops)
        return digest_of("delegate", subject, self.authority.text(), agents, self.purpose, *numbers)


CAPACITY: Final = Capacity(
    clients=lambda issuer: issuer.delegation_clients,
    max_age=lambda issuer: issuer.delegation_max_age,
    stranger=lambda: Refused(
        "a token of this client makes no standing delegations",
        code="delegation_client",
        hint="only a client named in delegation_clients under [[server.subjects]] does: never an agent's",
    ),
)


class Delegations:
    """The use cases, for every door."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        subjects: Subjects,
        standing: Standing,
        stops: Stops,
        refusals: Refusals,
        ids: Ids,
        policy: Policy,
    ) -> None:
        self._store = store
        self._clock = clock
        self._people = People(subjects, clock, CAPACITY, self._note)
        self._standing = standing
        self._stops = stops
        self._refusals = refusals
        self._ids = ids
        self._policy = policy

    # ---- for users

    async def create(self, token: str, terms: Terms, *, by: str = "", key: str = "") -> StandingDelegation:
        """Make one; the same request under the same idempotency key gives the same. ``by``: who brings the token, if known.

        Raises:
            InvalidToken: the token does not verify.
            Refused: it was given to another client, its sign-in is too long ago, or the user's word is over.
            PolicyDenied: the authority reaches beyond the registered audiences, or the token.
            Conflict: too many stand, or the idempotency key was used for another request.
        """

        async def made(subject: Subject) -> StandingDelegation:
            check_key(key)
            return await self._store.write(lambda writer: self._create(writer, subject, terms, key))

        return await self._people.act(token, made, by=by, fresh=True)

    async def withdraw(self, token: str, delegation_id: str, *, by: str = "") -> StandingDelegation:
        """End one of the user's own, with its tasks; ending it twice is fine. Raises NotFound, and as :meth:`create`."""

        async def ended(subject: Subject) -> StandingDelegation:
            return await self._end(delegation_id, by=subject.user, subject=subject)

        return await self._people.act(token, ended, by=by)

    async def own(self, token: str, delegation_id: str, *, by: str = "") -> StandingDelegation:
        """Give one of the user's own; raises NotFound, and as :meth:`create`."""

        async def found(subject: Subject) -> StandingDelegation:
            return await self._store.read(lambda reader: self._own(reader, subject, delegation_id))

        return await self._people.act(token, found, by=by)

    async def list_own(self, token: str, *, after: str | None = None, limit: int = 100, by: str = "") -> DelegationPage:
        """Give a page of the user's own, oldest first; raises Invalid, and as :meth:`create`."""

        async def page(subject: Subject) -> DelegationPage:
            def query(reader: Reader) -> DelegationPage:
                self._standing.require_signed_in(reader, subject, self._clock.now())
                return reader.list_delegations(subject.user, after=after, limit=limit)

            return await self._store.read(query)

        return await self._people.act(token, page, by=by)

    async def refused(self, error: BrokerError, *, user: str = "", by: str = "") -> None:
        """Record that somebody was refused here; ``user`` empty: it is not known who. A store that is away refused nobody."""
        if isinstance(error, Unavailable):
            return
        now = self._clock.now()
        who = by or user or "anonymous"
        await self._refusals.note(lambda _: user_records.delegation_refused(user, error.reason, who, now))

    # ---- for operators

    async def get(self, delegation_id: str) -> StandingDelegation:
        """Give one; raises NotFound."""
        return await self._store.read(lambda reader: _known(reader, delegation_id))

    async def list(self, user: str | None, *, after: str | None = None, limit: int = 100) -> DelegationPage:
        """Give a page, of one user or of all, oldest first; raises Invalid."""
        return await self._store.read(lambda reader: reader.list_delegations(user, after=after, limit=limit))

    async def revoke(self, delegation_id: str, *, by: str, reason: str = "") -> StandingDelegation:
        """End one, with its tasks, because an operator says so; raises NotFound, Invalid."""
        if reason:
            check_purpose(reason)
        return await self._end(delegation_id, by=by, reason=reason)

    # ---- inside

    async def _note(self, error: BrokerError, user: str, by: str) -> None:
        await self.refused(error, user=user, by=by)

    def _create(self, writer: Writer, subject: Subject, terms: Terms, key: str) -> StandingDelegation:
        now = self._clock.now()
        self._standing.hear(writer, subject, now)
        digest = terms.digest(subject)
        answers = Answers(writer, owner=f"user {subject.issuer} {subject.user}", key=key, digest=digest, now=now)
        if (kept := answers.recall()) is not None:
            known = writer.delegation(kept)
            if known is None or known.ended_at is not None:
                raise spent()
            return known
        if sum(each.expires_at > now for each in writer.standing_of(subject.user)) >= MAX_STANDING:
            raise PolicyDenied(
                f"{MAX_STANDING} delegations of this user stand already",
                code="too_many_delegations",
                hint="withdraw those that are no longer needed",
            )
        made = self._made(subject, terms, now)
        writer.add_delegation(made)
        writer.record(user_records.delegation_created(made, now))
        answers.keep(made.id)
        return made

    def _made(self, subject: Subject, terms: Terms, now: datetime) -> StandingDelegation:
        authority = subject.narrow(terms.authority)
        if authority.metered():
            raise unmetered()
        for location in authority.resources():
            self._policy.audiences.require_holding(location)
        assert subject.auth_time is not None
        longest = self._policy.defaults.max_task_ttl
        return StandingDelegation(
            id=self._ids.new(PREFIX, now),
            issuer=subject.issuer,
            user=subject.user,
            client=subject.party,
            token_hash=subject.token_hash,
            auth_time=subject.auth_time,
            authority=authority,
            agents=terms.agents,
            purpose=terms.purpose,
            max_task_ttl=min(terms.max_task_ttl or longest, longest),
            max_hops=terms.max_hops,
            created_at=now.replace(microsecond=0),
            expires_at=now.replace(microsecond=0) + timedelta(seconds=terms.expires_in),
            session=subject.session,
            acr=subject.acr,
        )

    def _own(self, reader: Reader, subject: Subject, delegation_id: str) -> StandingDelegation:
        # A token of a session that is over shows nothing and ends nothing, for as long as it would have been good.
        self._standing.require_signed_in(reader, subject, self._clock.now())
        found = _known(reader, delegation_id)
        if (found.user, found.issuer) != (subject.user, subject.issuer):
            raise _unknown()
        return found

    async def _end(
        self, delegation_id: str, *, by: str, reason: str = "", subject: Subject | None = None
    ) -> StandingDelegation:
        def act(writer: Writer) -> tuple[StandingDelegation, Stopped | None]:
            now = self._clock.now()
            known = _known(writer, delegation_id) if subject is None else self._own(writer, subject, delegation_id)
            ended = writer.end_delegation(known.id, Cause.DELEGATION_WITHDRAWN, now)
            if ended is None:
                return known, None
            writer.record(user_records.delegation_ended(ended, by, now, reason))
            wanted = Stop(
                kind=StopKind.DELEGATION,
                name=ended.id,
                source=ended.issuer,
                not_before=now,
                cause=Cause.DELEGATION_WITHDRAWN,
                changed_at=now,
            )
            return ended, stop(writer, wanted, by=by, now=now, reason=reason)

        ended, stopped = await self._store.write(act)
        if stopped is not None:
            await self._stops.finished(stopped)
        return ended


def _known(reader: Reader, delegation_id: str) -> StandingDelegation:
    found = reader.delegation(_id(delegation_id))
    if found is None:
        raise _unknown()
    return found


def _id(text: str) -> str:
    if ID.fullmatch(text) is None:
        raise _unknown()
    return text


def _unknown() -> NotFound:
    """Give the one answer for a delegation that is not there and for one that is another's."""
    return NotFound("no such delegation", code="delegation_unknown")


def _whole(value: JsonValue) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise Invalid("a time or number of the delegation is not a whole number", code="invalid_delegation")
    return value
