"""Node agents and the join tokens that admit them. That a join token works once is decided by the row count of its DELETE."""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from datetime import datetime
from typing import Final

from broker.errors import Conflict, Refused
from broker.server.store.rows import JoinToken, Node
from broker.server.store.sql import Duplicate, Row, Sql, SqlTables, micros, moment, text_set
from broker.server.store.tables.known import KEPT_ROWS, Known, Remembered
from broker.spiffe import SpiffeId

_COLUMNS: Final = "id, attestation_type, serial, new_serial, expires_at, selectors, banned, reattestable, agent_version"
_ONE: Final = f"SELECT {_COLUMNS} FROM nodes WHERE id = ?"
_ALL: Final = f"SELECT {_COLUMNS} FROM nodes ORDER BY id"
_PUT: Final = (
    f"INSERT INTO nodes ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (id) DO UPDATE SET attestation_type = excluded.attestation_type, serial = excluded.serial,"
    " new_serial = excluded.new_serial, expires_at = excluded.expires_at, selectors = excluded.selectors,"
    " banned = excluded.banned, reattestable = excluded.reattestable, agent_version = excluded.agent_version"
)
_REMOVE: Final = "DELETE FROM nodes WHERE id = ?"
_ADD_ADMISSION: Final = "INSERT INTO join_tokens (token_hash, agent_id, expires_at) VALUES (?, ?, ?)"
_ADMISSION: Final = "SELECT token_hash, agent_id, expires_at FROM join_tokens WHERE token_hash = ?"
_TAKE_ADMISSION: Final = "DELETE FROM join_tokens WHERE token_hash = ? AND expires_at > ?"


class NodeReading(SqlTables):
    """Reads nodes."""

    def __init__(self, sql: Sql) -> None:
        """Start with nothing parsed."""
        super().__init__(sql)
        self._nodes: Remembered[Row, Node] = Remembered(lambda row: _read(row, Known()), KEPT_ROWS)

    def node(self, agent_id: SpiffeId) -> Node | None:
        """Give one node, or None."""
        rows = self._sql.ask(_ONE, (str(agent_id),))
        return self._nodes.read(rows[0]) if rows else None

    def nodes(self) -> tuple[Node, ...]:
        """Give all nodes by SPIFFE ID."""
        known = Known()
        return tuple(_read(row, known) for row in self._sql.rows(_ALL))


class NodeWriting(NodeReading):
    """Writes nodes and join tokens."""

    def put_node(self, node: Node) -> None:
        """Add, or replace the one of the same id."""
        values = (
            str(node.id),
            node.attestation_type,
            node.serial,
            node.new_serial,
            micros(node.expires_at),
            text_set(node.selectors),
            int(node.banned),
            int(node.reattestable),
            node.agent_version,
        )
        self._sql.run(_PUT, values)

    def remove_node(self, agent_id: SpiffeId) -> Node | None:
        """Remove and give what was there, or None."""
        node = self.node(agent_id)
        self._sql.run(_REMOVE, (str(agent_id),))
        return node

    def add_join_token(self, token_hash: str, agent_id: SpiffeId | None, expires_at: datetime) -> None:
        """Add; Conflict(code="join_token_exists") when the hash is there."""
        wanted = None if agent_id is None else str(agent_id)
        try:
            self._sql.attempt(_ADD_ADMISSION, (token_hash, wanted, micros(expires_at)))
        except Duplicate:
            raise Conflict("the join token exists already", code="join_token_exists") from None

    def take_join_token(self, token_hash: str, now: datetime) -> JoinToken:
        """Use up; Refused(code="join_token_unknown") when it is not there, expired, or taken already."""
        # The words are SPIRE's, since its agents log them.
        row = self._sql.row(_ADMISSION, (token_hash,))
        # The DELETE decides, not what was read before it: of two takers, one removes a row.
        if self._sql.run(_TAKE_ADMISSION, (token_hash, micros(now))) != 1 or row is None:
            is_over = row is not None and row[2] <= micros(now)
            raise Refused(
                "join token expired"
                if is_over
                else "failed to attest: join token does not exist or has already been used",
                code="join_token_unknown",
                hint="make a new one with: broker join-token create",
            )
        return JoinToken(row[0], None if row[1] is None else SpiffeId(row[1]), moment(row[2]))


def _read(row: Row, known: Known) -> Node:
    return Node(
        id=SpiffeId(row[0]),
        attestation_type=row[1],
        serial=row[2],
        new_serial=row[3],
        expires_at=moment(row[4]),
        selectors=known.selectors(row[5]),
        banned=bool(row[6]),
        reattestable=bool(row[7]),
        agent_version=row[8],
    )
