-- What ends by its user: stops, the sessions that users came from, and the delegations that they left standing.

-- From not_before on (microseconds, by the clock of the source) what was given before counts no more; task tokens issued
-- before tokens_from (seconds, by our clock) are dead. unfinished: tasks that it ends may not be written down yet.
CREATE TABLE stops (
  kind        TEXT NOT NULL,
  name        TEXT NOT NULL,
  source      TEXT NOT NULL,
  not_before  INTEGER NOT NULL,
  tokens_from INTEGER NOT NULL,
  disabled    INTEGER NOT NULL CHECK (disabled IN (0, 1)),
  cause       TEXT NOT NULL,
  unfinished  INTEGER NOT NULL CHECK (unfinished IN (0, 1)),
  changed_at  INTEGER NOT NULL,
  PRIMARY KEY (kind, name, source)
) STRICT, WITHOUT ROWID;

CREATE INDEX stops_unfinished ON stops (changed_at) WHERE unfinished = 1;
CREATE INDEX stops_over ON stops (changed_at) WHERE disabled = 0;

-- One row for each session of a user that a task was started from; sid is empty where the issuer tells none. confirmed_at is
-- when the issuer last spoke of it: the iat of its newest token.
CREATE TABLE user_sessions (
  issuer       TEXT NOT NULL,
  sid          TEXT NOT NULL,
  user_id      TEXT NOT NULL,
  confirmed_at INTEGER NOT NULL,
  seen_at      INTEGER NOT NULL,
  PRIMARY KEY (issuer, sid, user_id)
) STRICT, WITHOUT ROWID;

CREATE INDEX user_sessions_over ON user_sessions (seen_at);

-- terms: canonical JSON of what never changes. A delegation stands exactly as long as it has no end.
CREATE TABLE delegations (
  id         TEXT PRIMARY KEY,
  issuer     TEXT NOT NULL,
  user_id    TEXT NOT NULL,
  terms      TEXT NOT NULL,
  auth_time  INTEGER NOT NULL,
  created_at INTEGER NOT NULL,
  expires_at INTEGER NOT NULL,
  ended_at   INTEGER,
  cause      TEXT,
  CHECK ((ended_at IS NULL) = (cause IS NULL))
) STRICT, WITHOUT ROWID;

CREATE INDEX delegations_user ON delegations (user_id, created_at, id);
CREATE INDEX delegations_over ON delegations (expires_at);

-- A frame that ends what somebody, or some service, has: whose, in which session, and from when on tokens live.
ALTER TABLE frames ADD COLUMN name TEXT NOT NULL DEFAULT '';
ALTER TABLE frames ADD COLUMN sid TEXT NOT NULL DEFAULT '';
ALTER TABLE frames ADD COLUMN not_before INTEGER NOT NULL DEFAULT 0;
