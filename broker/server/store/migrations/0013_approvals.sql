-- What waits for a person's yes, and what became of it.

-- digest: of the one thing that is wanted; wanted, approver: canonical JSON of what never changes once it is written. A row is
-- kept as long as its task: whose yes a living token hangs on can always be told.
CREATE TABLE approvals (
  id             TEXT PRIMARY KEY,
  task_id        TEXT NOT NULL REFERENCES tasks (id),
  user_id        TEXT NOT NULL,
  digest         TEXT NOT NULL,
  wanted         TEXT NOT NULL,
  purpose        TEXT NOT NULL,
  rules          TEXT NOT NULL,
  policy         TEXT NOT NULL,
  created_at     INTEGER NOT NULL,
  expires_at     INTEGER NOT NULL,
  asked_at       INTEGER NOT NULL,
  state          TEXT NOT NULL CHECK (state IN ('pending', 'approved', 'denied', 'used', 'withdrawn', 'expired')),
  decided_at     INTEGER,
  decided_by     TEXT NOT NULL,
  approver       TEXT,
  reason         TEXT NOT NULL,
  approved_until INTEGER,
  used_at        INTEGER,
  jti            TEXT,
  CHECK ((decided_at IS NULL) = (state = 'pending')),
  CHECK ((jti IS NULL) = (used_at IS NULL))
) STRICT, WITHOUT ROWID;

-- One thing is waited for, or granted, once at a time.
CREATE UNIQUE INDEX approvals_open ON approvals (task_id, digest) WHERE state IN ('pending', 'approved');
CREATE UNIQUE INDEX approvals_jti ON approvals (jti) WHERE jti IS NOT NULL;
CREATE INDEX approvals_task ON approvals (task_id, digest, created_at);
CREATE INDEX approvals_age ON approvals (created_at, id);
CREATE INDEX approvals_pending ON approvals (created_at, id) WHERE state = 'pending';
