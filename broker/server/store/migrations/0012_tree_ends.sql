-- Large trees that have ended as a whole: what says so of all their tasks at once, until each task's own row does. From then on
-- every row of such a tree without an end of its own (its root has one) reads as ended at tree_ended_at, for tree_cause.

CREATE TABLE tree_ends (
  tree          TEXT PRIMARY KEY REFERENCES tasks (id),
  tree_ended_at INTEGER NOT NULL,
  tree_cause    TEXT NOT NULL
) STRICT, WITHOUT ROWID;
