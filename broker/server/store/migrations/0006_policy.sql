-- Policies, as they were put in force: the highest version is the one that decides. Older ones stay for a while, so that the hash
-- in a decision can be read back into its rules.
CREATE TABLE policies (
  version   INTEGER PRIMARY KEY,
  hash      TEXT NOT NULL,
  text      TEXT NOT NULL,
  source    TEXT NOT NULL CHECK (source IN ('built_in', 'file', 'pushed')),
  put_by    TEXT NOT NULL,
  put_at    INTEGER NOT NULL
) STRICT;
