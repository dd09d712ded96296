-- SPIRE's additional attributes of an entry: what its agent does beforehand, and what each of its JWT-SVIDs says.

ALTER TABLE entries ADD COLUMN disable_x509_svid_prefetch INTEGER NOT NULL DEFAULT 0
  CHECK (disable_x509_svid_prefetch IN (0, 1));
ALTER TABLE entries ADD COLUMN jwt_svid_include_jti INTEGER NOT NULL DEFAULT 0
  CHECK (jwt_svid_include_jti IN (0, 1));
