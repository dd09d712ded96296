-- What services do once for a task: claimed before it is done, settled afterwards. A step names one action at one audience, and is
-- claimed by one service at a time; id is of that claim. settle_by is when a claim that nobody settled is in doubt.
CREATE TABLE actions (
  id               TEXT PRIMARY KEY,
  task_id          TEXT NOT NULL REFERENCES tasks (id),
  root             TEXT NOT NULL,
  audience         TEXT NOT NULL,
  step             TEXT NOT NULL,
  service          TEXT NOT NULL,
  action           TEXT NOT NULL,
  identifier       TEXT,
  parameter_digest TEXT,
  jti              TEXT NOT NULL,
  state            TEXT NOT NULL CHECK (state IN ('claimed', 'completed', 'released')),
  claimed_at       INTEGER NOT NULL,
  settle_by        INTEGER NOT NULL,
  settled_at       INTEGER,
  outcome          TEXT,
  UNIQUE (task_id, audience, step),
  CHECK ((settled_at IS NULL) = (state = 'claimed') AND (outcome IS NULL OR state = 'completed'))
) STRICT;

-- Tokens for one use that were used. It is theirs for good: a claim that was released gives none back.
CREATE TABLE used_tokens (
  jti     TEXT PRIMARY KEY,
  task_id TEXT NOT NULL REFERENCES tasks (id),
  used_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX used_tokens_task ON used_tokens (task_id);
