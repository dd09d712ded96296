"""The node agent: attests local processes and serves them identities, tasks and the revocation feed over one socket."""
