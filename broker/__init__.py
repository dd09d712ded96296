"""A workload-identity broker: attested SPIFFE identities, and one short-lived token for one task."""
