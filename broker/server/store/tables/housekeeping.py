"""Forgetting what nobody can ask for any more, a bounded number of rows at a time. The audit chain is never touched."""

from datetime import datetime, timedelta
from typing import Final

from broker.server.store.sql import SqlTables, micros

CHANGES_KEPT: Final = 100_000
"""How far back a watcher can resume; beyond it a snapshot is cheaper than the changes."""
KEPT_AFTER_END: Final = timedelta(days=1)
"""How long an ended task tree or a session without a valid leaf stays for questions; afterwards the audit log answers."""
PROOFS_EACH: Final = 4
"""Proofs that go with each row of another kind: they are short, have one index, and come with every request that has one."""

# Who comes with one that is over is told so, for as long.
_JOIN_TOKENS: Final = (
    "DELETE FROM join_tokens WHERE token_hash IN (SELECT token_hash FROM join_tokens WHERE expires_at <= ? LIMIT ?)"
)
_REMEMBERED: Final = (
    "DELETE FROM idempotency WHERE (owner, key) IN (SELECT owner, key FROM idempotency WHERE expires_at <= ? LIMIT ?)"
)
STOPS_KEPT: Final = timedelta(days=365)
"""How long a stop that disables nobody is kept: longer than any word that was given before it can still be shown."""
USER_SESSIONS_KEPT: Final = timedelta(days=31)
"""How long after the last start a user's session is kept: no task of it lives longer."""

# Frames say in seconds, as on the wire, until when they matter.
_FRAMES: Final = "DELETE FROM frames WHERE seq IN (SELECT seq FROM frames WHERE forget_at <= ? LIMIT ?)"
_PROOFS: Final = (
    "DELETE FROM spent_proofs WHERE id IN (SELECT id FROM spent_proofs WHERE expires_at <= ? LIMIT ?)",
    "DELETE FROM proof_nonces WHERE nonce IN (SELECT nonce FROM proof_nonces WHERE expires_at <= ? LIMIT ?)",
    "DELETE FROM client_assertions WHERE id IN (SELECT id FROM client_assertions WHERE expires_at <= ? LIMIT ?)",
)
_SESSIONS: Final = "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE not_after <= ? LIMIT ?)"
_STOPS: Final = (
    "DELETE FROM stops WHERE (kind, name, source) IN (SELECT kind, name, source FROM stops"
    " WHERE disabled = 0 AND unfinished = 0 AND changed_at <= ? LIMIT ?)"
)
_USER_SESSIONS: Final = (
    "DELETE FROM user_sessions WHERE (issuer, sid, user_id) IN"
    " (SELECT issuer, sid, user_id FROM user_sessions WHERE seen_at <= ? LIMIT ?)"
)
_DELEGATIONS: Final = "DELETE FROM delegations WHERE id IN (SELECT id FROM delegations WHERE expires_at <= ? LIMIT ?)"
_ISSUED: Final = "DELETE FROM issued_svids WHERE seq IN (SELECT seq FROM issued_svids WHERE not_after <= ? LIMIT ?)"
_LEAVES: Final = (
    "DELETE FROM session_leaves WHERE (session, x5t) IN"
    " (SELECT session, x5t FROM session_leaves WHERE not_after <= ? LIMIT ?)"
)
# A revoked certificate stays on its list until one was signed after its end (RFC 5280 §3.3).
_REVOKED: Final = (
    (
        "DELETE FROM revoked_svids WHERE (authority, serial) IN"
        " (SELECT authority, serial FROM revoked_svids WHERE not_after <= ? LIMIT ?)"
    ),
    (
        "DELETE FROM crls WHERE (authority, indirect) IN"
        " (SELECT authority, indirect FROM crls WHERE next_update <= ? LIMIT ?)"
    ),
)
# The newest change always stays: the next number is counted from it.
_CHANGES: Final = (
    "DELETE FROM changes WHERE seq IN"
    " (SELECT seq FROM changes WHERE seq <= (SELECT max(seq) FROM changes) - ? ORDER BY seq LIMIT ?)"
)
_DEAD_TREES: Final = (
    "SELECT t.id FROM tasks t WHERE t.depth = 0 AND t.ended_at IS NOT NULL AND t.ended_at <= ?"
    " AND NOT EXISTS (SELECT 1 FROM tasks c WHERE c.root = t.id AND (c.ended_at IS NULL OR c.ended_at > ?))"
    " AND NOT EXISTS (SELECT 1 FROM tasks c JOIN tokens k ON k.task_id = c.id WHERE c.root = t.id AND k.expires_at > ?)"
    " ORDER BY t.ended_at LIMIT ?"
)
_TREE: Final = (
    "DELETE FROM approvals WHERE task_id IN (SELECT id FROM tasks WHERE root = ?)",
    "DELETE FROM tokens WHERE task_id IN (SELECT id FROM tasks WHERE root = ?)",
    "DELETE FROM actions WHERE task_id IN (SELECT id FROM tasks WHERE root = ?)",
    "DELETE FROM used_tokens WHERE task_id IN (SELECT id FROM tasks WHERE root = ?)",
    "DELETE FROM task_resumes WHERE task_id IN (SELECT id FROM tasks WHERE root = ?)",
    "DELETE FROM root_epochs WHERE root = ?",
    "DELETE FROM tree_ends WHERE tree = ?",
    "DELETE FROM tasks WHERE root = ?",
)


class Sweeping(SqlTables):
    """Forgets."""

    def sweep(self, now: datetime, limit: int) -> int:
        """Forget up to ``limit`` rows (or task trees) of each kind that are past their time; give how many rows went."""
        over = micros(now)
        long_over = micros(now - KEPT_AFTER_END)
        gone = self._sql.run(_JOIN_TOKENS, (long_over, limit))
        gone += self._sql.run(_REMEMBERED, (over, limit))
        gone += self._sql.run(_FRAMES, (int(now.timestamp()), limit))
        gone += sum(self._sql.run(text, (over, limit * PROOFS_EACH)) for text in _PROOFS)
        gone += self._sql.run(_SESSIONS, (long_over, limit))
        gone += self._sql.run(_ISSUED, (over, limit))
        gone += self._sql.run(_STOPS, (micros(now - STOPS_KEPT), limit))
        gone += self._sql.run(_USER_SESSIONS, (micros(now - USER_SESSIONS_KEPT), limit))
        gone += self._sql.run(_DELEGATIONS, (long_over, limit))
        gone += self._sql.run(_LEAVES, (over, limit))
        gone += sum(self._sql.run(text, (long_over, limit)) for text in _REVOKED)
        gone += self._sql.run(_CHANGES, (CHANGES_KEPT, limit))
        for (root,) in self._sql.rows(_DEAD_TREES, (long_over, long_over, over, limit)):
            gone += sum(self._sql.run(text, (root,)) for text in _TREE)
        return gone
