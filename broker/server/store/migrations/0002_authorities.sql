-- Which replica holds an authority's key, and under whom the authority stands: its certificate chain above itself (concatenated
-- DER, without the root; NULL for none) and the key identifier of whoever signed it (empty for a self-signed one).

ALTER TABLE authorities ADD COLUMN replica TEXT NOT NULL DEFAULT '';
ALTER TABLE authorities ADD COLUMN upstream TEXT NOT NULL DEFAULT '';
ALTER TABLE authorities ADD COLUMN chain BLOB;

-- What the bundle holds that no replica of ours signs with: roots and keys from above, JWT keys that servers below publish,
-- and what an operator appended.

CREATE TABLE adopted_authorities (
  kind      TEXT NOT NULL CHECK (kind IN ('x509', 'jwt')),
  id        TEXT NOT NULL,
  public    BLOB NOT NULL,
  not_after INTEGER NOT NULL,
  tainted   INTEGER NOT NULL CHECK (tainted IN (0, 1)),
  source    TEXT NOT NULL CHECK (source IN ('upstream', 'downstream', 'appended', 'revoked')),
  PRIMARY KEY (kind, id)
) STRICT;

-- Replicas that were heard of: one that has been silent for a lease is gone, and its authorities sign nothing more.

CREATE TABLE replicas (
  id      TEXT PRIMARY KEY,
  seen_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
