-- Other trust domains: where their bundles come from, and the newest of each. A body is JSON, its numbers beyond 2^53 as text.

CREATE TABLE federation_relationships (
  trust_domain TEXT PRIMARY KEY,
  url          TEXT NOT NULL,
  profile      TEXT NOT NULL CHECK (profile IN ('https_web', 'https_spiffe')),
  endpoint_id  TEXT NOT NULL CHECK ((profile = 'https_spiffe') = (endpoint_id <> ''))
) STRICT, WITHOUT ROWID;

CREATE TABLE federated_bundles (
  trust_domain TEXT PRIMARY KEY,
  body         TEXT NOT NULL
) STRICT, WITHOUT ROWID;
