"""Who asks: is this workload, here and now, one that may act for users?

Judged from committed rows inside the transaction that grants something; only the long walk from a node agent down to its
entries is asked of memory, just before it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from broker.errors import Conflict, Refused
from broker.registry.entry import Entry
from broker.server.identity.changes import ENTRY_KIND, GONE, entry_of
from broker.server.store.ports import Reader, Writer
from broker.server.store.rows import Change, SessionRow
from broker.server.tasks import records
from broker.server.tasks.foreign import ForeignStarters
from broker.server.tasks.requests import Actor, Door
from broker.spiffe import SpiffeId


class Vouching(Protocol):
    """Which entries a node agent may speak for, kept in memory by the identity half (its ``Directory``)."""

    def authorized_entry(self, agent_id: SpiffeId, entry_id: str) -> Entry | None:
        """Give an entry if this agent may serve it now, else None."""
        ...


class Starters:
    """The entries that may start tasks, by SPIFFE ID: who may come to the HTTPS door. Fed by the change log.

    ``foreign``: the workloads of other trust domains, which have no entries.
    """

    def __init__(self, foreign: ForeignStarters | None = None) -> None:
        self._foreign = foreign
        self._by_id: dict[str, SpiffeId] = {}
        self._by_spiffe_id: dict[SpiffeId, set[str]] = {}

    def load(self, entries: Iterable[Entry]) -> None:
        """Take in a snapshot; changes after it come to :meth:`apply`."""
        for entry in entries:
            self._note(entry.id, entry)

    def apply(self, changes: Sequence[Change]) -> None:
        """Take in committed changes, in order."""
        for change in changes:
            if change.kind == ENTRY_KIND:
                self._note(change.key, None if change.body == GONE else entry_of(change.body))

    def entry_ids_of(self, spiffe_id: SpiffeId) -> tuple[str, ...]:
        """Give the ids of the entries that issue this SPIFFE ID and may start tasks, in one order."""
        return tuple(sorted(self._by_spiffe_id.get(spiffe_id, ())))

    def foreign_entry(self, spiffe_id: SpiffeId) -> Entry | None:
        """Give what stands for the entry of a workload of another trust domain, if it may start tasks."""
        return None if self._foreign is None else self._foreign.entry_of(spiffe_id)

    def _note(self, entry_id: str, entry: Entry | None) -> None:
        before = self._by_id.pop(entry_id, None)
        if before is not None:
            ids = self._by_spiffe_id[before]
            ids.discard(entry_id)
            if not ids:
                del self._by_spiffe_id[before]
        if entry is not None and entry.may_start_tasks:
            self._by_id[entry_id] = entry.spiffe_id
            self._by_spiffe_id.setdefault(entry.spiffe_id, set()).add(entry_id)


@dataclass(frozen=True, slots=True)
class Claim:
    """An actor and the entries that could stand for it, not judged yet. See :func:`claim`."""

    actor: Actor
    entry_ids: tuple[str, ...]
    foreign: Entry | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """An actor and its workload session, found in this transaction; None where no node agent has told of one."""

    actor: Actor
    session: str | None

    @property
    def owner(self) -> str:
        """Who an idempotency key belongs to: this process, not all that share its SPIFFE ID."""
        return f"{self.actor.spiffe_id} {self.session or self.actor.x5t or self.actor.jkt}"


@dataclass(frozen=True, slots=True)
class Admitted(Caller):
    """A caller that may start tasks and have tokens: its session lives, and its entry says so."""

    entry: Entry


def claim(actor: Actor, vouching: Vouching, starters: Starters) -> Claim:
    """Ask the identity half about an actor, before the transaction; raises Refused when its agent may not vouch."""
    if actor.door is Door.AGENT:
        if actor.agent is None or actor.entry_id is None or actor.session is None:
            raise Refused("the node agent did not say which workload asks", code="workload_missing")
        if vouching.authorized_entry(actor.agent, actor.entry_id) is None:
            raise Refused("this node agent may not speak for that entry", code="agent_not_authorized")
        return Claim(actor, (actor.entry_id,))
    return Claim(actor, starters.entry_ids_of(actor.spiffe_id), starters.foreign_entry(actor.spiffe_id))


def admit(writer: Writer, claimed: Claim, now: datetime) -> Admitted:
    """Judge an actor by the rows of this moment, and note its session; raises Refused."""
    actor = claimed.actor
    _require_svid(writer, actor, now)
    if actor.door is Door.AGENT:
        assert actor.agent is not None
        _require_node(writer, actor.agent)
        entry = _usable(writer, claimed.entry_ids, actor.spiffe_id, now)
        return Admitted(actor, _note_session(writer, actor, entry, now), entry)
    if claimed.foreign is not None:
        return Admitted(actor, None, claimed.foreign)
    row = _session_of(writer, actor)
    if row is None:
        return Admitted(actor, None, _usable(writer, claimed.entry_ids, actor.spiffe_id, now))
    if row.ended_at is not None or row.spiffe_id != actor.spiffe_id:
        raise _session_ended()
    _require_node(writer, row.agent)
    return Admitted(actor, row.id, _usable(writer, (row.entry_id,), actor.spiffe_id, now))


def admit_requester(reader: Reader, actor: Actor, now: datetime) -> Caller:
    """Judge a workload that brings a token which it did not ask for itself: its SVID and its session stand; raises Refused.

    Whether it may have anything for that token is the caller's to ask. Only at the HTTPS door.
    """
    _require_svid(reader, actor, now)
    row = _session_of(reader, actor)
    if row is None:
        return Caller(actor, None)
    if row.ended_at is not None or row.spiffe_id != actor.spiffe_id:
        raise _session_ended()
    _require_node(reader, row.agent)
    return Caller(actor, row.id)


def admit_service(writer: Writer, claimed: Claim, now: datetime) -> Caller:
    """Judge a service that asks about tokens for it: its SVID, session and entry stand, may it start tasks or not; raises Refused."""
    actor = claimed.actor
    if actor.door is Door.HTTPS:
        return admit_requester(writer, actor, now)
    assert actor.agent is not None
    _require_svid(writer, actor, now)
    _require_node(writer, actor.agent)
    entry = _standing(writer, claimed.entry_ids, actor.spiffe_id, now)
    if entry is None:
        raise Refused("the workload's entry is not there any more", code="entry_gone")
    return Caller(actor, _note_session(writer, actor, entry, now))


def identify(writer: Reader, actor: Actor) -> Caller:
    """Find an actor's session without judging whether it may still start anything: enough to end or see its own task."""
    if actor.door is Door.HTTPS:
        row = _session_of(writer, actor)
        return Caller(actor, row.id if row is not None and row.spiffe_id == actor.spiffe_id else None)
    known = None if actor.session is None else writer.session(actor.session)
    if known is None or known.agent != actor.agent or known.spiffe_id != actor.spiffe_id:
        raise Refused("this node agent has not told of that workload session", code="session_unknown")
    return Caller(actor, known.id)


def _require_svid(reader: Reader, actor: Actor, now: datetime) -> None:
    if actor.not_after <= now:
        raise Refused("the workload's certificate has expired", code="svid_expired")
    if actor.serial and reader.is_revoked(actor.serial):
        raise Refused("the workload's SVID was revoked", code="svid_revoked", hint="fetch a new one and ask again")


def _session_of(reader: Reader, actor: Actor) -> SessionRow | None:
    """Find the session of a certificate; who came without one has none that we could tell."""
    return reader.session_by_x5t(actor.x5t) if actor.x5t else None


def _require_node(writer: Reader, agent: SpiffeId) -> None:
    node = writer.node(agent)
    if node is None or node.banned:
        raise Refused("the node agent is not admitted", code="agent_not_admitted")


def _usable(writer: Writer, entry_ids: Sequence[str], spiffe_id: SpiffeId, now: datetime) -> Entry:
    for entry_id in entry_ids:
        entry = _standing(writer, (entry_id,), spiffe_id, now)
        if entry is not None and entry.may_start_tasks:
            return entry
    raise Refused(
        "this workload may not start tasks",
        code="tasks_not_allowed",
        hint="an operator sets may_start_tasks on its registration entry",
    )


def _standing(reader: Reader, entry_ids: Sequence[str], spiffe_id: SpiffeId, now: datetime) -> Entry | None:
    for entry_id in entry_ids:
        entry = reader.entry(entry_id)
        if entry is not None and entry.spiffe_id == spiffe_id and not entry.is_expired(now):
            return entry
    return None


def _note_session(writer: Writer, actor: Actor, entry: Entry, now: datetime) -> str:
    """Keep the session under the agent that vouches for it; one that has ended, or is another's, is refused."""
    assert actor.session is not None
    assert actor.agent is not None
    known = writer.session(actor.session)
    if known is not None and known.ended_at is not None:
        raise _session_ended()
    if known is None or known.x5t != actor.x5t or known.agent != actor.agent or known.entry_id != entry.id:
        row = SessionRow(
            actor.session, actor.agent, actor.spiffe_id, entry.id, actor.x5t, actor.not_after, now, None,
            actor.serial, actor.run,
        )  # fmt: skip
        try:
            writer.put_session(row)
        except Conflict as error:
            raise Refused(error.message, code=error.reason) from None
        if known is None:
            writer.record(records.session_started(row))
    return actor.session


def _session_ended() -> Refused:
    return Refused("the workload session has ended", code="session_ended", hint="a new process needs a new task")
