"""The port of the store for proofs of possession: what was shown once, and by whom; composed in :mod:`broker.server.store.ports`."""

from datetime import datetime
from typing import Protocol


class ProofReads(Protocol):
    """Nonces for proofs, and the leaves of workload sessions, read."""

    def knows_nonce(self, nonce: str, now: datetime) -> bool:
        """Say whether any replica handed this nonce out, and it has not expired."""
        ...

    def holds_leaf(self, session_id: str, x5t: str, now: datetime) -> bool:
        """Say whether a living session holds this leaf, or held it before a rotation, and the leaf has not expired."""
        ...


class ProofWrites(ProofReads, Protocol):
    """Proofs, nonces and client assertions, written. Each write holds for all replicas: by constraint, not by memory."""

    def spend_proof(self, proof_id: str, expires_at: datetime) -> None:
        """Keep; Refused(code="proof_replayed") when it is there already."""
        ...

    def claim_assertion(self, assertion_id: str, jkt: str, expires_at: datetime) -> None:
        """Keep the key that a client assertion came with; Refused(code="assertion_replayed") when it is another one's."""
        ...

    def add_nonce(self, nonce: str, expires_at: datetime) -> None:
        """Keep a nonce that is going to be handed out."""
        ...
