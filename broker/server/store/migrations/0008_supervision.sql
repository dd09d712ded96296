-- Who watches over tasks, and whom they hang on.

-- The leaves that a session held before its present one, for as long as each is valid: a process may still show one.
CREATE TABLE session_leaves (
  session   TEXT NOT NULL,
  x5t       TEXT NOT NULL,
  not_after INTEGER NOT NULL,
  serial    TEXT NOT NULL,
  PRIMARY KEY (session, x5t)
) STRICT, WITHOUT ROWID;

CREATE INDEX session_leaves_x5t ON session_leaves (x5t);
CREATE INDEX session_leaves_over ON session_leaves (not_after);

-- The run of the node agent that told of the session: of another run it knows nothing. Empty where an older agent told it.
ALTER TABLE sessions ADD COLUMN run TEXT NOT NULL DEFAULT '';

CREATE INDEX tasks_agent ON tasks (agent) WHERE ended_at IS NULL;
