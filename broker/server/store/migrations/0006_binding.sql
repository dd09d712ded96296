-- How task tokens are tied to their holders: leaves of sessions, nonces and proofs of DPoP, client assertions.

-- Every leaf that a workload session has held and that has not expired: after a rotation the one before stays the session's own
-- until its end.
CREATE TABLE session_leaves (
  x5t       TEXT NOT NULL,
  session   TEXT NOT NULL,
  not_after INTEGER NOT NULL,
  PRIMARY KEY (x5t, session)
) STRICT, WITHOUT ROWID;

CREATE INDEX session_leaves_over ON session_leaves (not_after);

INSERT INTO session_leaves (x5t, session, not_after) SELECT x5t, id, not_after FROM sessions;

DROP INDEX sessions_x5t;

-- Proofs that were shown once, by a hash of key, jti, method and address: none is taken twice, by no replica and after no restart.
CREATE TABLE spent_proofs (
  id         TEXT PRIMARY KEY,
  expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX spent_proofs_over ON spent_proofs (expires_at);

-- Nonces that were handed out, for whichever replica sees them again. They are no secrets: whoever asks gets one.
CREATE TABLE proof_nonces (
  nonce      TEXT PRIMARY KEY,
  expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX proof_nonces_over ON proof_nonces (expires_at);

-- JWT-SVIDs that authenticated a client, by their hash, and the one key that each came with first (RFC 7638 thumbprint).
CREATE TABLE client_assertions (
  id         TEXT PRIMARY KEY,
  jkt        TEXT NOT NULL,
  expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX client_assertions_over ON client_assertions (expires_at);
