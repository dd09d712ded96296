"""Rotation by hand: prepare, activate, taint, revoke; and the same two for who stands above us.

The order is the protection: only what is prepared can become active, only what is old can be tainted, only what is
tainted can be revoked, and what signs now can be neither. Words and statuses of refusals are SPIRE's where it has the
same method; who may call is not known here.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final

from broker.audit.events import Event
from broker.errors import BrokerError, Invalid, Refused, Unavailable
from broker.server.authority.authorities import root_key_id
from broker.server.authority.journal import Journal, find
from broker.server.authority.rotation import Rotation
from broker.server.store.ports import Writer
from broker.server.store.rows import AdoptedAuthority, AuthorityKind, AuthorityRow, AuthorityState, Source

NAMES: Final = {AuthorityKind.X509: "X.509", AuthorityKind.JWT: "JWT", AuthorityKind.TASK: "task-token"}
_UNTAINTED: Final = {AuthorityKind.X509: "root CA", AuthorityKind.JWT: "key", AuthorityKind.TASK: "key"}
ABOVE_CODE: Final = "upstream_above"
NOT_ABOVE_CODE: Final = "no_upstream"
"""Codes of what the configuration forbids: FAILED_PRECONDITION on the wire."""
OnDistrust = Callable[[AuthorityKind, str, str], Awaitable[None]]
"""Ends what hangs on an authority: (its kind, its id, by whom)."""


@dataclass(frozen=True, slots=True)
class States:
    """This replica's authorities of one kind; ``old`` is the one that was active before."""

    active: AuthorityRow
    prepared: AuthorityRow | None
    old: AuthorityRow | None


class Forced:
    """The use cases of operators in the key room."""

    def __init__(self, journal: Journal, rotation: Rotation, *, is_below: bool) -> None:
        """``is_below``: whether there is an upstream authority."""
        self._on_distrust: OnDistrust | None = None
        self._journal = journal
        self._rotation = rotation
        self._is_below = is_below

    def on_distrust(self, listener: OnDistrust) -> None:
        """Call after an authority was tainted or revoked, before who asked for it is answered."""
        self._on_distrust = listener

    def all(self, kind: AuthorityKind) -> tuple[AuthorityRow, ...]:
        """Give the authorities of one kind, of all replicas, oldest first."""
        return tuple(row for row in self._journal.published.authorities if row.kind is kind)

    def states(self, kind: AuthorityKind) -> States:
        """Give this replica's; raises Unavailable before the first is active."""
        rows = self.all(kind)
        ours = [row for row in rows if row.replica == self._rotation.rules.replica]
        active = _last(ours, AuthorityState.ACTIVE)
        if active is None:
            raise Unavailable("server is initializing", code="authority_missing", hint="try again in a few seconds")
        # What an earlier replica, gone by now, signed with is nobody else's business any more.
        old = _last(ours, AuthorityState.OLD) or _last(rows, AuthorityState.OLD)
        return States(active, _last(ours, AuthorityState.PREPARED), old)

    async def prepare(self, kind: AuthorityKind, actor: str) -> AuthorityRow:
        """Make and publish a successor; one that was prepared before is dropped. Raises Unavailable."""
        self.states(kind)
        return await self._rotation.prepare(kind, actor)

    async def activate(self, kind: AuthorityKind, authority_id: str, actor: str) -> AuthorityRow:
        """Let the prepared one take over; raises Invalid, Conflict, Unavailable."""
        row = self._known(kind, authority_id)
        if row.replica != self._rotation.rules.replica or row.state is AuthorityState.ACTIVE:
            raise _unexpected()
        if row.state is not AuthorityState.PREPARED:
            raise BrokerError(
                f"only Prepared authorities can be activated: {_status(row)}",
                code="authority_not_prepared",
                hint="prepare one, then activate that",
            )
        await self._rotation.activate(row, actor)
        return replace(row, state=AuthorityState.ACTIVE)

    async def taint(self, kind: AuthorityKind, authority_id: str, actor: str) -> AuthorityRow:
        """Have everything it signed replaced at once; raises Invalid, Refused, BrokerError."""
        self._require_not_below(kind, "tainted")
        row = self._known(kind, authority_id)
        if row.state is AuthorityState.ACTIVE:
            raise Invalid(
                "unable to taint current local authority",
                code="authority_active",
                hint="prepare and activate another one first",
            )
        if row.state is not AuthorityState.OLD:
            raise Invalid(f"only Old local authorities can be tainted: {_status(row)}", code="authority_not_old")

        def alter(writer: Writer) -> bool:
            current = _still_old(writer, row)
            if current.tainted:
                raise _failed("taint", kind, f"{_UNTAINTED[kind]} is already tainted", "authority_tainted")
            writer.put_authority(replace(current, tainted=True))
            return True

        await self._journal.commit(Event.AUTHORITY_TAINTED, kind, row.id, alter, actor=actor)
        await self._distrusted(kind, row.id, actor)
        return replace(row, tainted=True)

    async def revoke(self, kind: AuthorityKind, authority_id: str, actor: str) -> AuthorityRow:
        """Take it out of the bundle: nothing that it signed is accepted any more. Raises Invalid, Refused, BrokerError."""
        self._require_not_below(kind, "revoked")
        row = self._known(kind, authority_id, within="invalid authority ID: ")
        if row.state is AuthorityState.ACTIVE:
            raise Invalid(
                "invalid authority ID: unable to use current authority",
                code="authority_active",
                hint="prepare and activate another one, and taint this one, first",
            )
        if row.state is not AuthorityState.OLD:
            raise Invalid(
                "invalid authority ID: "
                + (
                    "only Old local authority can be revoked"
                    if kind is AuthorityKind.X509
                    else "unable to use a prepared key"
                ),
                code="authority_not_old",
            )

        def alter(writer: Writer) -> bool:
            if not _still_old(writer, row).tainted:
                raise _failed(
                    "revoke",
                    kind,
                    f"it is not possible to revoke an untainted {_UNTAINTED[kind]}",
                    "authority_untainted",
                )
            writer.remove_authority(row.kind, row.id)
            for adopted in writer.published().adopted:
                if (adopted.kind, adopted.id) == (row.kind, row.id):
                    # Published above, too, from where it would come back.
                    writer.put_adopted(replace(adopted, source=Source.REVOKED))
            return True

        await self._journal.commit(Event.AUTHORITY_REVOKED, kind, row.id, alter, actor=actor)
        await self._distrusted(kind, row.id, actor)
        return row

    async def taint_upstream(self, key_id: str, actor: str) -> str:
        """Taint a root above us, by its key identifier in hex, and give that; raises Invalid, Refused, BrokerError."""
        asked = self._upstream_key(key_id, "provided subject key id is not valid")
        await self._alter_upstream(
            asked,
            Event.AUTHORITY_TAINTED,
            actor,
            lambda row: None if row.tainted else replace(row, tainted=True),
            "failed to taint upstream authority: root CA is already tainted",
        )
        return asked

    async def revoke_upstream(self, key_id: str, actor: str) -> str:
        """Take a tainted root above us out of our bundle; raises Invalid, Refused, BrokerError."""
        asked = self._upstream_key(key_id, "invalid subject key ID")
        await self._alter_upstream(
            asked,
            Event.AUTHORITY_REVOKED,
            actor,
            lambda row: replace(row, source=Source.REVOKED) if row.tainted else None,
            "failed to revoke X.509 upstream authority: it is not possible to revoke an untainted root CA",
        )
        return asked

    async def _alter_upstream(
        self,
        key_id: str,
        event: Event,
        actor: str,
        change: Callable[[AdoptedAuthority], AdoptedAuthority | None],
        otherwise: str,
    ) -> None:
        def alter(writer: Writer) -> bool:
            rows = [row for row in writer.published().adopted if row.kind is AuthorityKind.X509 and row.id == key_id]
            if not rows or rows[0].source is not Source.UPSTREAM:
                raise BrokerError("no ca found with provided subject key ID", code="authority_unknown")
            changed = change(rows[0])
            if changed is None:
                raise BrokerError(otherwise, code="authority_untainted")
            writer.put_adopted(changed)
            return True

        below = [row for row in self.all(AuthorityKind.X509) if key_id in (row.upstream, root_key_id(row))]
        await self._journal.commit(event, AuthorityKind.X509, key_id, alter, actor=actor)
        for row in below:
            await self._distrusted(AuthorityKind.X509, row.id, actor)

    async def _distrusted(self, kind: AuthorityKind, authority_id: str, actor: str) -> None:
        if self._on_distrust is not None:
            await self._on_distrust(kind, authority_id, actor)

    def _upstream_key(self, key_id: str, what: str) -> str:
        if not self._is_below:
            raise Refused("upstream authority is not configured", code=NOT_ABOVE_CODE)
        asked = key_id.lower() if key_id.isascii() else ""
        if not asked:
            raise Invalid(f"{what}: no subject key ID provided", code="authority_unknown")
        rows = self.all(AuthorityKind.X509)
        for row in rows:
            if row.state is not AuthorityState.OLD and asked in (row.upstream, root_key_id(row)):
                # SPIRE's word for it, misspelt there; programs compare.
                raise Invalid(
                    f"{what}: unable to use upstream authority singing current authority"
                    if row.state is AuthorityState.ACTIVE
                    else f"{what}: only upstream authorities signing an old authority can be used",
                    code="authority_active",
                    hint="have the upstream authority changed, then prepare and activate another authority",
                )
        if not any(asked in (row.upstream, root_key_id(row)) for row in rows):
            raise Invalid(f"{what}: upstream authority didn't sign the old local authority", code="authority_unknown")
        return asked

    def _require_not_below(self, kind: AuthorityKind, verb: str) -> None:
        if self._is_below and kind is AuthorityKind.X509:
            raise Refused(
                f"local authority can't be {verb} if there is an upstream authority",
                code=ABOVE_CODE,
                hint="taint and revoke the upstream authority",
            )

    def _known(self, kind: AuthorityKind, authority_id: str, *, within: str = "") -> AuthorityRow:
        if not authority_id:
            raise Invalid(f"{within}no authority ID provided", code="authority_unnamed")
        for row in self.all(kind):
            if row.id == authority_id:
                return row
        if not within:
            raise _unexpected()
        raise Invalid(
            within
            + (
                "only Old local authority can be revoked"
                if kind is AuthorityKind.X509
                else "no JWT authority found with provided authority ID"
            ),
            code="authority_unknown",
        )


def _last(rows: "list[AuthorityRow] | tuple[AuthorityRow, ...]", state: AuthorityState) -> AuthorityRow | None:
    return next((row for row in reversed(rows) if row.state is state), None)


def _still_old(writer: Writer, row: AuthorityRow) -> AuthorityRow:
    current = find(writer, row.kind, row.id)
    if current is None or current.state is not AuthorityState.OLD:
        raise _unexpected()
    return current


def _status(row: AuthorityRow) -> str:
    return f"unsupported local authority status: {row.state.value.upper()}"


def _unexpected() -> Invalid:
    return Invalid("unexpected authority ID", code="authority_unknown", hint="broker authority x509 show")


def _failed(verb: str, kind: AuthorityKind, reason: str, code: str) -> BrokerError:
    return BrokerError(f"failed to {verb} {NAMES[kind]} authority: {reason}", code=code)
