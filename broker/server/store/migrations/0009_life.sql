-- The life of a task: whom it took over from, and how often it was taken up again.

-- supersedes is the task that was handed off to this one, which may lie in another tree and be forgotten before it; history
-- is a JSON list of the SPIFFE IDs that held the work before, the latest first.
ALTER TABLE tasks ADD COLUMN supersedes TEXT;
ALTER TABLE tasks ADD COLUMN history TEXT NOT NULL DEFAULT '[]';

CREATE TABLE task_resumes (
  task_id      TEXT NOT NULL REFERENCES tasks (id),
  number       INTEGER NOT NULL,
  at           INTEGER NOT NULL,
  session      TEXT,
  resumed_from TEXT,
  PRIMARY KEY (task_id, number)
) STRICT, WITHOUT ROWID;
