-- The first schema. Times are whole microseconds since 1970, so that they come back exactly; frames alone carry what
-- is on the wire: committed_at in milliseconds, forget_at in seconds. Lists are canonical JSON text. An applied migration is never edited: its checksum is kept, and a server that
-- finds another one refuses to start.

CREATE TABLE store_facts (
  name  TEXT PRIMARY KEY,
  value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE counters (
  name  TEXT PRIMARY KEY,
  value INTEGER NOT NULL CHECK (value >= 0)
) STRICT, WITHOUT ROWID;

-- The audit chain and the change log: numbered by the one writer, in the transaction that they tell of.

CREATE TABLE audit_records (
  seq  INTEGER PRIMARY KEY,
  prev BLOB NOT NULL,
  body BLOB NOT NULL,
  hash BLOB NOT NULL
) STRICT;

CREATE TABLE changes (
  seq  INTEGER PRIMARY KEY,
  kind TEXT NOT NULL,
  key  TEXT NOT NULL,
  body TEXT NOT NULL
) STRICT;

-- The identity half.

CREATE TABLE entries (
  id                TEXT PRIMARY KEY,
  spiffe_id         TEXT NOT NULL,
  parent_id         TEXT NOT NULL,
  selectors         TEXT NOT NULL,
  selectors_digest  TEXT NOT NULL,
  x509_svid_ttl     INTEGER NOT NULL,
  jwt_svid_ttl      INTEGER NOT NULL,
  federates_with    TEXT NOT NULL,
  admin             INTEGER NOT NULL CHECK (admin IN (0, 1)),
  downstream        INTEGER NOT NULL CHECK (downstream IN (0, 1)),
  expires_at        INTEGER,
  dns_names         TEXT NOT NULL,
  revision          INTEGER NOT NULL,
  store_svid        INTEGER NOT NULL CHECK (store_svid IN (0, 1)),
  hint              TEXT NOT NULL,
  created_at        INTEGER NOT NULL,
  allowed_audiences TEXT NOT NULL,
  may_start_tasks   INTEGER NOT NULL CHECK (may_start_tasks IN (0, 1)),
  description       TEXT NOT NULL,
  owner             TEXT NOT NULL,
  UNIQUE (spiffe_id, parent_id, selectors_digest)
) STRICT;

CREATE TABLE nodes (
  id               TEXT PRIMARY KEY,
  attestation_type TEXT NOT NULL,
  serial           TEXT NOT NULL,
  new_serial       TEXT NOT NULL,
  expires_at       INTEGER NOT NULL,
  selectors        TEXT NOT NULL,
  banned           INTEGER NOT NULL CHECK (banned IN (0, 1)),
  reattestable     INTEGER NOT NULL CHECK (reattestable IN (0, 1)),
  agent_version    TEXT NOT NULL
) STRICT;

CREATE TABLE join_tokens (
  token_hash TEXT PRIMARY KEY,
  agent_id   TEXT,
  expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE authorities (
  kind       TEXT NOT NULL CHECK (kind IN ('x509', 'jwt', 'task')),
  id         TEXT NOT NULL,
  public     BLOB NOT NULL,
  state      TEXT NOT NULL CHECK (state IN ('prepared', 'active', 'old')),
  not_before INTEGER NOT NULL,
  not_after  INTEGER NOT NULL,
  tainted    INTEGER NOT NULL CHECK (tainted IN (0, 1)),
  PRIMARY KEY (kind, id)
) STRICT;

CREATE TABLE sessions (
  id         TEXT PRIMARY KEY,
  agent      TEXT NOT NULL,
  spiffe_id  TEXT NOT NULL,
  entry_id   TEXT NOT NULL,
  x5t        TEXT NOT NULL,
  not_after  INTEGER NOT NULL,
  started_at INTEGER NOT NULL,
  ended_at   INTEGER
) STRICT, WITHOUT ROWID;

CREATE INDEX sessions_x5t ON sessions (x5t);
CREATE INDEX sessions_agent ON sessions (agent) WHERE ended_at IS NULL;
CREATE INDEX sessions_entry ON sessions (entry_id) WHERE ended_at IS NULL;
CREATE INDEX sessions_over ON sessions (not_after);

-- The task half. A row is living exactly as long as it has no end.

CREATE TABLE tasks (
  id          TEXT PRIMARY KEY,
  root        TEXT NOT NULL REFERENCES tasks (id),
  parent      TEXT REFERENCES tasks (id),
  depth       INTEGER NOT NULL CHECK (depth >= 0 AND (depth = 0) = (parent IS NULL) AND (depth = 0) = (root = id)),
  user_id     TEXT NOT NULL,
  agent       TEXT NOT NULL,
  session     TEXT,
  purpose     TEXT NOT NULL,
  authority   TEXT NOT NULL,
  delegation  TEXT NOT NULL,
  created_at  INTEGER NOT NULL,
  expires_at  INTEGER NOT NULL,
  supervision TEXT NOT NULL,
  state       TEXT NOT NULL,
  version     INTEGER NOT NULL,
  epoch       INTEGER NOT NULL,
  cause       TEXT,
  ended_at    INTEGER,
  CHECK ((ended_at IS NULL) = (state IN ('pending', 'active', 'suspended')))
) STRICT;

CREATE INDEX tasks_root ON tasks (root);
CREATE INDEX tasks_parent ON tasks (parent) WHERE parent IS NOT NULL;
CREATE INDEX tasks_age ON tasks (created_at, id);
CREATE INDEX tasks_session ON tasks (session) WHERE ended_at IS NULL;
CREATE INDEX tasks_due ON tasks (expires_at) WHERE ended_at IS NULL;
CREATE INDEX tasks_user ON tasks (user_id) WHERE ended_at IS NULL;
CREATE INDEX tasks_over ON tasks (ended_at) WHERE ended_at IS NOT NULL AND depth = 0;

CREATE TABLE root_epochs (
  root  TEXT PRIMARY KEY REFERENCES tasks (id),
  epoch INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE tokens (
  jti        TEXT PRIMARY KEY,
  task_id    TEXT NOT NULL REFERENCES tasks (id),
  root       TEXT NOT NULL,
  resource   TEXT NOT NULL,
  scope      TEXT NOT NULL,
  agent      TEXT NOT NULL,
  session    TEXT,
  x5t        TEXT,
  issued_at  INTEGER NOT NULL,
  expires_at INTEGER NOT NULL,
  hash       TEXT NOT NULL,
  revoked_at INTEGER
) STRICT, WITHOUT ROWID;

CREATE INDEX tokens_task ON tokens (task_id);

CREATE TABLE frames (
  seq          INTEGER PRIMARY KEY,
  kind         TEXT NOT NULL,
  root         TEXT NOT NULL,
  task         TEXT NOT NULL,
  epoch        INTEGER NOT NULL,
  state        TEXT NOT NULL,
  session      TEXT NOT NULL,
  jti          TEXT NOT NULL,
  keys         TEXT NOT NULL,
  cause        TEXT NOT NULL,
  committed_at INTEGER NOT NULL,
  forget_at    INTEGER NOT NULL
) STRICT;

CREATE INDEX frames_over ON frames (forget_at);

CREATE TABLE idempotency (
  owner      TEXT NOT NULL,
  key        TEXT NOT NULL,
  digest     TEXT NOT NULL,
  result     TEXT NOT NULL,
  expires_at INTEGER NOT NULL,
  PRIMARY KEY (owner, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_over ON idempotency (expires_at);
