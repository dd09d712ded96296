"""Which policy is in force: put there by a settings file at the start or by an operator's push, kept in the store for every replica.

The store holds the one policy of all replicas. A server whose settings name a file puts that file in force when it starts; a server
without one begins with the built-in policy, and follows what is in the store otherwise. A push is refused where a file is named: the
next start would undo it. Each change is a row, a record and a change of the log in one transaction.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.clock import Clock
from broker.errors import BrokerError, Conflict, Misconfigured, NotFound
from broker.server.store.policy_ports import PolicyRow, PolicySource
from broker.server.store.ports import Reader, Store, Writer
from broker.server.store.rows import Change
from broker.server.tasks.policy import bundle as bundles
from broker.server.tasks.policy.bundle import MAX_BYTES, Bundle, PolicyRefused
from broker.server.tasks.policy.rules import Rules
from broker.telemetry.log import get_logger

POLICY_CHANGE: Final = "policy"
"""The change log's word for another policy in force; its body says all of it."""
SERVER: Final = "server"

log = get_logger("policy")


class Bundles:
    """The policy of this estate."""

    def __init__(
        self, store: Store, rules: Rules, clock: Clock, *, path: Path | None, on_change: Callable[[], None]
    ) -> None:
        """``path`` is the file that the settings name; ``on_change`` is called after another policy came into force."""
        self._store = store
        self._rules = rules
        self._clock = clock
        self._path = path
        self._on_change = on_change
        self._version = 0

    async def start(self) -> Callable[[], None]:
        """Put in force what the settings say, or take in what the store has; give the function that ends following it.

        Raises:
            Misconfigured: the settings' file cannot be read or is refused; nothing starts until it is right.
        """
        stop = self._store.subscribe(self._apply)
        wanted = _from_file(self._path) if self._path is not None else None
        row = await self._store.write(lambda writer: self._at_start(writer, wanted))
        self._take_in(row)
        return stop

    async def push(self, text: str, *, by: str, expected: str = "") -> PolicyRow:
        """Put a policy in force everywhere; the same one again changes nothing. ``expected``: the hash that it replaces.

        Raises:
            PolicyRefused: it is not accepted.
            Conflict: a settings file rules here, or the one in force is not the expected one.
        """
        if self._path is not None:
            raise Conflict(
                "the settings name a policy file, which comes back with the next start",
                code="policy_is_file",
                hint="change the file and restart, or take path out of [server.policy] and push",
            )
        bundle = bundles.read(text)

        def act(writer: Writer) -> PolicyRow:
            now = writer.policy()
            if expected and (now is None or now.hash != expected):
                raise Conflict(
                    "another policy is in force than the one that this was made from",
                    code="stale_version",
                    hint="broker policy show",
                )
            return self._put(writer, bundle, PolicySource.PUSHED, by, now)

        return await self._store.write(act)

    async def show(self, hash_: str = "") -> PolicyRow:
        """Give the policy in force, or an older one by its hash; raises NotFound."""

        def query(reader: Reader) -> PolicyRow | None:
            return reader.policy(hash_)

        row = await self._store.read(query)
        if row is None:
            raise NotFound("no policy of this hash is kept", code="policy_unknown")
        return row

    # ---- inside the transaction

    def _at_start(self, writer: Writer, wanted: Bundle | None) -> PolicyRow:
        now = writer.policy()
        if wanted is not None:
            return self._put(writer, wanted, PolicySource.FILE, SERVER, now)
        if now is None or now.source is PolicySource.BUILT_IN:
            # Also when a newer version of this program brings another one.
            return self._put(writer, bundles.built_in(), PolicySource.BUILT_IN, SERVER, now)
        return now

    def _put(
        self, writer: Writer, bundle: Bundle, source: PolicySource, by: str, before: PolicyRow | None
    ) -> PolicyRow:
        if before is not None and before.hash == bundle.hash and before.source is source:
            return before
        version = 1 if before is None else before.version + 1
        row = PolicyRow(version, bundle.hash, bundle.text, source, by, self._clock.now())
        writer.put_policy(row)
        writer.record(_changed(row, bundle, before))
        writer.change(POLICY_CHANGE, str(row.version), _body(row))
        return row

    # ---- after the commit

    def _apply(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.kind == POLICY_CHANGE:
                self._take_in(_read(change))

    def _take_in(self, row: PolicyRow) -> None:
        if row.version <= self._version:
            return
        self._version = row.version
        try:
            self._rules.use(bundles.read(row.text))
        except PolicyRefused as error:
            # A newer server may know more: until this one does, nothing is permitted here, and nothing is ended.
            self._rules.deny_all(row.hash, f"the policy in force cannot be read by this version: {error.message}")
            log.error(  # noqa: TRY400 - the reason says all of it
                "policy_unreadable", policy=row.hash, code=error.reason, error=error.message
            )
            return
        log.info("policy_in_force", policy=row.hash, source=row.source.value)
        self._on_change()


def _from_file(path: Path) -> Bundle:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise Misconfigured(
            f"the policy {path} cannot be read: {reason}", code="policy_unreadable", hint="see [server.policy] path"
        ) from None
    try:
        return bundles.read(text)
    except BrokerError as error:
        raise Misconfigured(
            f"the policy {path} is refused: {error.message}", code=error.reason, hint=error.hint
        ) from None


def _changed(row: PolicyRow, bundle: Bundle, before: PolicyRow | None) -> Record:
    fields: dict[str, FieldValue] = {
        "policy": row.hash,
        "version": str(row.version),
        "previous": None if before is None else before.hash,
        "source": row.source.value,
        "rule_count": len(bundle.rules),
    }
    return Record(Event.POLICY_CHANGED, row.put_at, row.put_by, row.hash, fields)


def _body(row: PolicyRow) -> str:
    return json.dumps(
        {
            "hash": row.hash,
            "text": row.text,
            "source": row.source.value,
            "put_by": row.put_by,
            "put_at": row.put_at.isoformat(),
        },
        separators=(",", ":"),
    )


def _read(change: Change) -> PolicyRow:
    value = json.loads(change.body)
    return PolicyRow(
        int(change.key),
        value["hash"],
        value["text"],
        PolicySource(value["source"]),
        value["put_by"],
        datetime.fromisoformat(value["put_at"]),
    )
