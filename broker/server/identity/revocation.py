"""X.509-SVIDs are taken back: by serial number, by workload session, by entry or by SPIFFE ID.

One act writes the revocation, ends the workload sessions that hold what it took back with their tasks, records both, and
says so in the change log; memory, and with it the TLS port, has it before the caller is answered. What a process is entitled
to is the entry's business: its node agent fetches a new SVID at once. Agents and the server itself are banned or rotated, not
revoked here. Knows no keys: lists are signed by :mod:`broker.server.authority.crl_publisher`.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.clock import Clock
from broker.errors import BrokerError, Conflict, Invalid, NotFound, Refused
from broker.server.authority.authorities import Authorities
from broker.server.authority.crl import REASONS
from broker.server.authority.crl_publisher import REVOKED_KIND, CrlPublisher
from broker.server.identity.directory import Directory
from broker.server.store.ports import Reader, Store, Writer
from broker.server.store.revocation_rows import IssuedSvid, RevokedSvid
from broker.server.store.rows import AuthorityKind, Change, SessionRow
from broker.spiffe import SpiffeId, TrustDomain
from broker.telemetry.log import get_logger

MAX_REVOKED: Final = 20_000
"""Revoked SVIDs that have not expired: a list of a megabyte, which still fits into a message of the Workload API."""
AT_ONCE: Final = 500
"""Most SVIDs of one transaction: others wait for it."""
MAX_NAME: Final = 2048
"""Longest id that is looked for: as long as a SPIFFE ID may be."""
_SERIAL: Final = re.compile("(?:0x)?([0-9a-f]{1,40})")
_LOOKED_FOR: Final = re.compile("[A-Za-z0-9:/._-]+")

log = get_logger("revocation")
EndSession = Callable[[Writer, SessionRow, str, datetime], int]
"""Ends a session in the writer's transaction; (writer, session, by whom, now), and gives how many tasks went with it."""


@dataclass(frozen=True, slots=True)
class Target:
    """What to revoke: exactly one of these; raises Invalid.

    ``serial`` in hex, colons and ``0x`` allowed; ``authority`` belongs to it: the authority's id, which is its subject key
    identifier in hex, needed only for an SVID that this server does not know.
    """

    serial: str = ""
    authority: str = ""
    session: str = ""
    entry_id: str = ""
    spiffe_id: str = ""

    def __post_init__(self) -> None:
        """Check that one thing is named, and how it is written."""
        if sum(map(bool, (self.serial, self.session, self.entry_id, self.spiffe_id))) != 1:
            raise Invalid("name one of: a serial number, a session, an entry, a SPIFFE ID", code="revoke_what")
        if self.authority and not self.serial:
            raise Invalid("an authority is named together with a serial number", code="revoke_what")
        for name in (self.session, self.entry_id, self.spiffe_id):
            if name and (len(name) > MAX_NAME or _LOOKED_FOR.fullmatch(name) is None):
                raise Invalid("the id holds characters that no id has", code="invalid_id")
        if self.serial:
            match = _SERIAL.fullmatch(self.serial.replace(":", "").lower())
            if match is None or not int(match[1], 16):
                raise Invalid(
                    "the serial number is not hexadecimal", code="invalid_serial", hint="openssl x509 -serial shows it"
                )
            object.__setattr__(self, "serial", f"{int(match[1], 16):x}")


@dataclass(frozen=True, slots=True)
class Revoked:
    """What came of it: the SVIDs taken back now, how many had been before, and what ended with them."""

    svids: tuple[RevokedSvid, ...]
    before: int
    sessions: tuple[str, ...]
    tasks: int


@dataclass(frozen=True, slots=True)
class _Found:
    """SVIDs to take back, and the session that is asked for."""

    svids: tuple[IssuedSvid, ...]
    session: SessionRow | None = None
    kept: int = 0


class Revocation:
    """The use cases of revocation, and the memory of what was revoked."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        trust_domain: TrustDomain,
        directory: Directory,
        authorities: Authorities,
        publisher: CrlPublisher,
        end_session: EndSession,
    ) -> None:
        self._store = store
        self._clock = clock
        self._trust_domain = trust_domain
        self._directory = directory
        self._authorities = authorities
        self._publisher = publisher
        self._end_session = end_session
        self._serials: dict[str, set[int]] = {}

    async def load(self) -> None:
        """Learn what was revoked, then follow the change log; raises Unavailable."""
        # Following first: what comes twice is there once.
        self._store.subscribe(self._committed)
        rows = await self._store.read(lambda reader: reader.revoked_svids())
        self._take((row.authority, row.serial) for row in rows)

    async def revoke(self, target: Target, reason: int, actor: str) -> Revoked:
        """Take SVIDs back. Asked again, it does nothing more and says so.

        Raises:
            Invalid: the reason is none of RFC 5280's that fit a leaf.
            NotFound: no such session, entry, authority, or living SVID.
            Refused: it is an agent's or the server's own.
            Conflict: too many are revoked already.
        """
        if reason not in REASONS:
            raise Invalid("the reason is not one for an SVID", code="invalid_reason")
        self._check(target)
        found = await self._store.read(lambda reader: self._find(reader, target))
        if found.kept + len(found.svids) > MAX_REVOKED:
            raise Conflict(
                f"more than {MAX_REVOKED} SVIDs would be on the revocation lists",
                code="revocations_full",
                hint="rotate the authority and taint the old one: everything it signed is replaced",
            )
        done = Revoked((), 0, (), 0)
        for start in range(0, max(len(found.svids), 1), AT_ONCE):
            part = found.svids[start : start + AT_ONCE]
            done = _sum(done, await self._store.write(self._act(part, found.session, reason, actor)))
        log.info("svids_revoked", count=len(done.svids), sessions=len(done.sessions), tasks=done.tasks, by=actor)
        try:
            await self._publisher.settle()
        except BrokerError as error:
            # Revoked they are; the publisher tries again.
            log.warning("crl_not_published", code=error.reason, error=error.message)
        return done

    def _check(self, target: Target) -> None:
        if not target.spiffe_id:
            return
        spiffe_id = SpiffeId(target.spiffe_id)
        if spiffe_id.trust_domain != self._trust_domain or not spiffe_id.path:
            raise Invalid("the SPIFFE ID is not a workload's in this trust domain", code="invalid_spiffe_id")
        if spiffe_id.path == "/spire" or spiffe_id.path.startswith("/spire/"):
            raise _not_a_workloads()

    def _find(self, reader: Reader, target: Target) -> _Found:
        now, kept = self._clock.now(), len(reader.revoked_svids())
        if target.serial:
            found = tuple(one for one in reader.issued_svids(target.serial, now) if one.serial == target.serial)
            return _Found(self._by_serial(target, found), kept=kept)
        if target.session:
            session = reader.session(target.session)
            if session is None:
                raise NotFound("there is no such workload session", code="session_not_found")
            return _Found(_of_session(reader, session, now), session, kept)
        if target.entry_id:
            found = tuple(one for one in reader.issued_svids(target.entry_id, now) if one.entry_id == target.entry_id)
            what = "entry"
        else:
            found = tuple(
                one for one in reader.issued_svids(target.spiffe_id, now) if str(one.spiffe_id) == target.spiffe_id
            )
            what = "SPIFFE ID"
        if not found and reader.entry(target.entry_id) is None:
            raise NotFound(f"no living SVID of that {what} is known", code="svid_not_found")
        return _Found(found, kept=kept)

    def _by_serial(self, target: Target, found: tuple[IssuedSvid, ...]) -> tuple[IssuedSvid, ...]:
        number = str(int(target.serial, 16))
        if any(number in {node.serial, node.new_serial} for node in self._directory.nodes()):
            raise _not_a_workloads()
        rows = [row for row in self._authorities.rows if row.kind is AuthorityKind.X509]
        if target.authority:
            wanted = target.authority.replace(":", "").lower()
            named = [row for row in rows if row.id == wanted]
            if not named:
                raise NotFound(
                    "there is no such X.509 authority, or what it signed has expired", code="authority_not_found"
                )
            # One that is not known may still be out there, until its authority ends.
            return tuple(one for one in found if one.authority == named[0].id) or (
                IssuedSvid(named[0].id, target.serial, self._trust_domain.id, "", "", named[0].not_after),
            )
        if not found:
            raise NotFound(
                "no living SVID with that serial number is known",
                code="svid_not_found",
                hint="name its authority, too, by the certificate's authority key identifier, to revoke it nevertheless",
            )
        return found

    def _act(
        self, svids: Sequence[IssuedSvid], asked: SessionRow | None, reason: int, actor: str
    ) -> Callable[[Writer], Revoked]:
        def act(writer: Writer) -> Revoked:
            now = self._clock.now()
            fresh = [row for row in (_row(one, reason, now) for one in svids) if writer.add_revoked(row)]
            for row in fresh:
                writer.record(_record(row, actor, now))
            if fresh:
                body = json.dumps([[row.authority, row.serial] for row in fresh], separators=(",", ":"))
                writer.change(REVOKED_KIND, fresh[0].authority, body)
            over = [*_holding(writer, svids, now), *([asked] if asked and asked.ended_at is None else [])]
            ended = {one.id: one for one in over}
            tasks = sum(self._end_session(writer, one, actor, now) for one in ended.values())
            return Revoked(tuple(fresh), len(svids) - len(fresh), tuple(ended), tasks)

        return act

    def _committed(self, changes: Sequence[Change]) -> None:
        self._take(
            (authority, serial)
            for change in changes
            if change.kind == REVOKED_KIND
            for authority, serial in json.loads(change.body)
        )

    def _take(self, serials: Iterable[tuple[str, str]]) -> None:
        before = sum(map(len, self._serials.values()))
        for authority, serial in serials:
            self._serials.setdefault(authority, set()).add(int(serial, 16))
        if sum(map(len, self._serials.values())) == before:
            return
        if before > 2 * MAX_REVOKED:
            # Old ones that the store has forgotten: their authorities are no longer published.
            there = {row.id for row in self._authorities.rows}
            self._serials = {name: numbers for name, numbers in self._serials.items() if name in there}
        self._authorities.set_revoked({name: frozenset(numbers) for name, numbers in self._serials.items()})


def _of_session(reader: Reader, session: SessionRow, now: datetime) -> tuple[IssuedSvid, ...]:
    """Give the SVID that a session holds, or all of its entry on its node where that is not known for sure."""
    on_node = tuple(
        one
        for one in reader.issued_svids(session.entry_id, now)
        if one.entry_id == session.entry_id and one.agent == str(session.agent)
    )
    # NOTE(security): which leaf it is, is the agent's word. A number that was not signed for it counts as none.
    return tuple(one for one in on_node if one.serial == session.serial) or on_node


def _holding(writer: Writer, svids: Sequence[IssuedSvid], now: datetime) -> Iterable[SessionRow]:
    """Give the living sessions that hold one of these, or did before a rotation; where an agent does not tell the leaf, those that may."""
    serials = {one.serial for one in svids}
    agents = {(one.entry_id, one.agent) for one in svids}
    for entry_id in sorted({one.entry_id for one in svids if one.entry_id}):
        for session in writer.sessions_of_entry(entry_id):
            held = {leaf.serial for leaf in writer.session_leaves(session.id, now)}
            if (
                held & serials
                or session.serial in serials
                or (not session.serial and (entry_id, str(session.agent)) in agents)
            ):
                yield session


def _row(one: IssuedSvid, reason: int, now: datetime) -> RevokedSvid:
    spiffe_id = str(one.spiffe_id) if one.spiffe_id.path else ""
    return RevokedSvid(one.authority, one.serial, spiffe_id, one.entry_id, one.not_after, now, reason)


def _record(row: RevokedSvid, actor: str, now: datetime) -> Record:
    fields: dict[str, FieldValue] = {
        "kind": "x509",
        "serial": row.serial,
        "authority": row.authority,
        "expires_at": int(row.not_after.timestamp()),
        "reason": str(row.reason),
        **({"entry_id": row.entry_id} if row.entry_id else {}),
    }
    return Record(Event.SVID_REVOKED, now, actor, row.spiffe_id or row.serial, fields)


def _sum(one: Revoked, other: Revoked) -> Revoked:
    return Revoked(
        one.svids + other.svids, one.before + other.before, one.sessions + other.sessions, one.tasks + other.tasks
    )


def _not_a_workloads() -> Refused:
    return Refused(
        "that SVID is an agent's or the server's own",
        code="reserved_spiffe_id",
        hint="ban or evict the agent; a server's SVID ends with its authority",
    )
