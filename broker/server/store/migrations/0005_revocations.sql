-- X.509-SVIDs that are taken back before their time, and what it takes to find them.

-- What was signed and has not expired: a row for each batch, under the number of its last audit record. svids is a JSON
-- list of [serial, entry id, SPIFFE ID, seconds of its end]; not_after is the last of these ends.
CREATE TABLE issued_svids (
  seq       INTEGER PRIMARY KEY,
  authority TEXT NOT NULL,
  agent     TEXT NOT NULL,
  svids     TEXT NOT NULL,
  not_after INTEGER NOT NULL
) STRICT;

CREATE INDEX issued_svids_over ON issued_svids (not_after);

CREATE TABLE revoked_svids (
  authority  TEXT NOT NULL,
  serial     TEXT NOT NULL,
  spiffe_id  TEXT NOT NULL,
  entry_id   TEXT NOT NULL,
  not_after  INTEGER NOT NULL,
  revoked_at INTEGER NOT NULL,
  reason     INTEGER NOT NULL,
  PRIMARY KEY (authority, serial)
) STRICT, WITHOUT ROWID;

CREATE INDEX revoked_svids_over ON revoked_svids (not_after);
CREATE INDEX revoked_svids_serial ON revoked_svids (serial);

-- The newest list of each authority: of its own certificates, and (indirect) of those whose authority cannot sign any more.
CREATE TABLE crls (
  authority   TEXT NOT NULL,
  indirect    INTEGER NOT NULL CHECK (indirect IN (0, 1)),
  number      INTEGER NOT NULL,
  this_update INTEGER NOT NULL,
  next_update INTEGER NOT NULL,
  der         BLOB NOT NULL,
  PRIMARY KEY (authority, indirect)
) STRICT, WITHOUT ROWID;

-- The serial number of the leaf that the session holds, as its node agent told it; empty where an older agent did not.
ALTER TABLE sessions ADD COLUMN serial TEXT NOT NULL DEFAULT '';
