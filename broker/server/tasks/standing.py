"""Whether a user's word still counts at this moment: judged by committed rows, wherever it is about to be used.

One question for every door: the start of a task, each of its tokens, the start of a child, an introspection. A task's own
state may lag behind a stop of many; this never does. Where an issuer says nothing of ends, its sessions count only for so
long after its last word of them (``session_lease``); what becomes of their tasks is in :mod:`broker.server.tasks.user_leases`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final

from broker.errors import Refused
from broker.server.store.ports import Reader, Writer
from broker.server.store.rows import TokenRow
from broker.server.store.user_rows import UserLease, UserSession
from broker.server.tasks.records import sha256
from broker.server.tasks.subjects import Subject
from broker.spiffe import SpiffeId
from broker.tasks import Authority, Delegation, Resource
from broker.tasks.standing import StandingDelegation, not_named
from broker.tasks.stop import StopKind, names_of, require_going

_NO_LEASES: Final[Mapping[str, timedelta]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class StandingWord:
    """What a user left standing, in the place of a token of theirs. Only :meth:`Standing.recall` gives one."""

    standing: StandingDelegation

    @property
    def user(self) -> str:
        """Whose word it is."""
        return self.standing.user

    @property
    def issuer(self) -> str:
        """Whose user they are."""
        return self.standing.issuer

    @property
    def expires_at(self) -> datetime:
        """Until when it stands."""
        return self.standing.expires_at

    def narrow(self, wanted: Authority) -> Authority:
        """Give what is wanted, if the user left all of it standing; raises PolicyDenied."""
        return self.standing.authority.narrow(wanted)

    @property
    def max_task_ttl(self) -> int:
        """The longest life of a task, in seconds."""
        return self.standing.max_task_ttl

    @property
    def token_hash(self) -> str:
        """What stands for it in the digest of a request."""
        return sha256(self.standing.id.encode())

    def delegation(self) -> Delegation:
        """Give what a task of it carries."""
        return self.standing.delegation()


class Standing:
    """Judges users' words. ``leases``: how long a session counts after its issuer's last word, by issuer."""

    def __init__(self, leases: Mapping[str, timedelta] = _NO_LEASES) -> None:
        self.leases = leases

    def require(
        self,
        reader: Reader,
        delegation: Delegation,
        now: datetime,
        *,
        agent: SpiffeId | None = None,
        audience: Resource | None = None,
    ) -> None:
        """Refuse when the user, the session or the standing delegation was stopped, or is not confirmed any more.

        ``agent`` and ``audience`` are of a token that is to be issued. Raises Refused, Unavailable.
        """
        names = [*names_of(delegation)]
        if agent is not None:
            names.append((StopKind.AGENT, str(agent)))
        if audience is not None:
            names.append((StopKind.AUDIENCE, audience.text))
        stops = reader.stops(names)
        if stops:
            require_going(stops, delegation, now)
        self._require_confirmed(reader, delegation, now)

    def require_token(self, reader: Reader, delegation: Delegation, row: TokenRow, now: datetime) -> None:
        """Refuse a token that was issued before its user, agent or audience was stopped; raises Refused."""
        names = (
            *names_of(delegation),
            (StopKind.AGENT, str(row.agent)),
            (StopKind.AUDIENCE, row.resource),
        )
        stops = reader.stops(names)
        if any(row.issued_at.timestamp() < stop.tokens_from for stop in stops):
            raise Refused("what was issued until then was stopped", code="token_stopped")
        if stops:
            require_going((each for each in stops if each.tokens_from <= now.timestamp()), delegation, now)
        self._require_confirmed(reader, delegation, now)

    def require_signed_in(self, reader: Reader, subject: Subject, now: datetime) -> None:
        """Refuse a user's token whose user or session was stopped, where nothing is given on it; raises Refused, Unavailable."""
        delegation = subject.delegation()
        require_going(reader.stops(names_of(delegation)), delegation, now)

    def hear(self, writer: Writer, subject: Subject, now: datetime) -> bool:
        """Take a user's token at its word: its session is confirmed by it. Raises Refused where the word was stopped.

        Gives whether tasks of the session wait to be let go on: what was suspended while nothing was heard of it.
        """
        delegation = subject.delegation()
        stops = writer.stops(names_of(delegation))
        if stops:
            require_going(stops, delegation, now)
        self._see(writer, subject, now)
        known = self._require_confirmed(writer, delegation, now)
        if known is None or known.lease is UserLease.HELD:
            return False
        if known.lease is UserLease.LAPSED:
            writer.put_user_lease(known, UserLease.RETURNING)
        return True

    def recall(self, reader: Reader, delegation_id: str, agent: SpiffeId, now: datetime) -> StandingWord:
        """Give a standing delegation's word to an agent that it names; raises Refused, PolicyDenied.

        One that is not there and one that names others are told apart by nobody: ids are not secrets.
        """
        delegation = reader.delegation(delegation_id)
        if delegation is None:
            raise not_named()
        delegation.require_agent(agent)
        delegation.require_live(now)
        self.require(reader, delegation.delegation(), now)
        return StandingWord(delegation)

    def _see(self, writer: Writer, subject: Subject, now: datetime) -> None:
        """Note the session that a user's token is of: what an end of it will be looked up by."""
        if subject.session is not None or subject.issuer in self.leases:
            writer.see_user_session(
                UserSession(subject.issuer, subject.session or "", subject.user, subject.issued_at, now)
            )

    def unconfirmed(self, reader: Reader, delegation: Delegation, now: datetime) -> bool:
        """Tell whether nothing was heard of the delegation's session for longer than its lease."""
        return self._is_silent(self._session(reader, delegation), delegation, now)

    def _session(self, reader: Reader, delegation: Delegation) -> UserSession | None:
        """Give what is known of the session, where its issuer's silence counts."""
        if delegation.issuer not in self.leases or delegation.standing is not None:
            return None
        return reader.user_session(delegation.issuer, delegation.session or "", delegation.user)

    def _is_silent(self, known: UserSession | None, delegation: Delegation, now: datetime) -> bool:
        lease = self.leases.get(delegation.issuer)
        if lease is None or delegation.standing is not None:
            return False
        confirmed_at = delegation.issued_at if known is None else known.confirmed_at
        return confirmed_at is None or now >= confirmed_at + lease

    def _require_confirmed(self, reader: Reader, delegation: Delegation, now: datetime) -> UserSession | None:
        known = self._session(reader, delegation)
        if self._is_silent(known, delegation, now):
            raise Refused(
                "nothing was heard of the user's session for too long",
                code="user_session_unconfirmed",
                hint="show a user token of the same session that its issuer gave lately",
            )
        return known
