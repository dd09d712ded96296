"""Attacks on tasks and their tokens, through real ports: a server in this process, real TLS, certificates, OIDC and store."""
