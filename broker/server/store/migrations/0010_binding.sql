-- How task tokens are tied to their holders: nonces and proofs of DPoP, client assertions.

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
