"""Proofs of possession: what was shown once, which nonces were handed out, and whose a client assertion is."""

from datetime import datetime
from typing import Final

from broker.errors import Refused
from broker.server.store.sql import SqlTables, micros

_KNOWS_NONCE: Final = "SELECT 1 FROM proof_nonces WHERE nonce = ? AND expires_at > ?"
_HOLDS_LEAF: Final = (
    "SELECT 1 FROM sessions s WHERE s.id = ? AND s.ended_at IS NULL AND (s.x5t = ? AND s.not_after > ?"
    " OR EXISTS (SELECT 1 FROM session_leaves l WHERE l.session = s.id AND l.x5t = ? AND l.not_after > ?))"
)
_SPEND: Final = "INSERT INTO spent_proofs (id, expires_at) VALUES (?, ?) ON CONFLICT (id) DO NOTHING"
_CLAIM: Final = (
    "INSERT INTO client_assertions (id, jkt, expires_at) VALUES (?, ?, ?)"
    " ON CONFLICT (id) DO UPDATE SET expires_at = client_assertions.expires_at"
    " WHERE client_assertions.jkt = excluded.jkt"
)
_ADD_NONCE: Final = "INSERT INTO proof_nonces (nonce, expires_at) VALUES (?, ?) ON CONFLICT (nonce) DO NOTHING"


class ProofReading(SqlTables):
    """Reads nonces, and the leaves of sessions."""

    def knows_nonce(self, nonce: str, now: datetime) -> bool:
        """Say whether any replica handed this nonce out, and it has not expired."""
        return self._sql.row(_KNOWS_NONCE, (nonce, micros(now))) is not None

    def holds_leaf(self, session_id: str, x5t: str, now: datetime) -> bool:
        """Say whether a living session holds this leaf, or held it before a rotation, and the leaf has not expired."""
        return self._sql.row(_HOLDS_LEAF, (session_id, *(x5t, micros(now)) * 2)) is not None


class ProofWriting(ProofReading):
    """Writes proofs, nonces and client assertions."""

    def spend_proof(self, proof_id: str, expires_at: datetime) -> None:
        """Keep; Refused(code="proof_replayed") when it is there already."""
        if not self._sql.run(_SPEND, (proof_id, micros(expires_at))):
            raise Refused("the proof was used before", code="proof_replayed", hint="make a new proof for each request")

    def claim_assertion(self, assertion_id: str, jkt: str, expires_at: datetime) -> None:
        """Keep the key that a client assertion came with; Refused(code="assertion_replayed") when it is another one's."""
        if not self._sql.run(_CLAIM, (assertion_id, jkt, micros(expires_at))):
            raise Refused(
                "the client assertion came with another key before",
                code="assertion_replayed",
                hint="send it with the key that it came with first, or wait for the next JWT-SVID",
            )

    def add_nonce(self, nonce: str, expires_at: datetime) -> None:
        """Keep a nonce that is going to be handed out."""
        self._sql.run(_ADD_NONCE, (nonce, micros(expires_at)))
