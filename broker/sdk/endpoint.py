"""Where the Workload API is: the address, from an argument or from ``SPIFFE_ENDPOINT_SOCKET``.

SPIFFE Workload Endpoint, section 4: a URI of scheme ``unix`` with an empty authority and an absolute path. Scheme ``tcp`` is
refused on purpose: over TCP nobody can attest who asks.
"""

import os

from broker.errors import Misconfigured

ENDPOINT_VARIABLE = "SPIFFE_ENDPOINT_SOCKET"
SECURITY_HEADER = (("workload.spiffe.io", "true"),)
"""Metadata of every call to the agent's socket: proves that the caller is no victim of request forgery."""


def socket_target(address: str | None = None) -> str:
    """Give the gRPC target (``unix:/path``) of the Workload API.

    Raises:
        Misconfigured: neither the argument nor the variable names a socket, or what it names is not a Unix socket.
    """
    given = address or os.environ.get(ENDPOINT_VARIABLE, "")
    if not given:
        raise Misconfigured(
            "no Workload API socket is configured",
            code="no_endpoint_socket",
            hint=f"set {ENDPOINT_VARIABLE}=unix:///run/broker/agent/public/api.sock, or pass the address",
        )
    path = given.removeprefix("unix://") if given.startswith("unix://") else given.removeprefix("unix:")
    if not path.startswith("/") or "?" in path or "#" in path:
        raise Misconfigured(
            f"not a Unix socket address: {given!r}",
            code="bad_endpoint_socket",
            hint="the form is unix:///absolute/path",
        )
    return f"unix:{path}"


CALL_SECONDS = 20.0
"""For one call to the node agent: it may wait two seconds for an entry and asks the server itself."""
