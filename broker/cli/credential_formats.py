"""A JWT-SVID as other programs ask for credentials: they run a command and read its standard output.

``google-executable``: google.com AIP-4117. ``k8s-exec``: ``ExecCredential`` of ``client.authentication.k8s.io``.
``aws-credential-process``: keys for a role, which AWS's token service gives for the JWT-SVID
(:mod:`broker.cli.aws_keys`). Nothing else may be printed: google-auth reads standard error into the same text.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from broker.cli.output import timestamp
from broker.errors import BrokerError, Invalid, InvalidJson

GOOGLE_TOKEN_TYPES: Final = ("urn:ietf:params:oauth:token-type:id_token", "urn:ietf:params:oauth:token-type:jwt")
"""What a JWT may be called there; the first where google-auth does not say which it wants."""
KUBERNETES_VERSIONS: Final = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
"""The first where the caller does not say which it speaks."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A JWT-SVID; ``expires_at`` in seconds since 1970. ``repr`` shows no token."""

    spiffe_id: str
    token: str = field(repr=False)
    expires_at: int


Write = Callable[[Fetched, Mapping[str, str]], Mapping[str, Any]]


def google_executable(svid: Fetched, environ: Mapping[str, str]) -> Mapping[str, Any]:
    """Answer google-auth; raises Invalid when it wants a kind of token that this is not."""
    wanted = environ.get("GOOGLE_EXTERNAL_ACCOUNT_TOKEN_TYPE") or GOOGLE_TOKEN_TYPES[0]
    if wanted not in GOOGLE_TOKEN_TYPES:
        raise Invalid(
            f"google-auth asks for {wanted}, which a JWT-SVID is not",
            code="token_type",
            hint=f"set subject_token_type to {GOOGLE_TOKEN_TYPES[1]} in the credential configuration",
        )
    return {
        "version": 1,
        "success": True,
        "token_type": wanted,
        "id_token": svid.token,
        "expiration_time": svid.expires_at,
    }


def k8s_exec(svid: Fetched, environ: Mapping[str, str]) -> Mapping[str, Any]:
    """Answer kubectl and client-go, in the version that they speak; raises Invalid for one that is not known."""
    return {
        "apiVersion": _kubernetes_version(environ.get("KUBERNETES_EXEC_INFO", "")),
        "kind": "ExecCredential",
        "status": {"token": svid.token, "expirationTimestamp": timestamp(datetime.fromtimestamp(svid.expires_at, UTC))},
    }


def aws_credential_process(svid: Fetched, environ: Mapping[str, str]) -> Mapping[str, Any]:
    """Answer AWS's SDKs with keys of ``AWS_ROLE_ARN``; raises Invalid, Refused or Unavailable."""
    from broker.cli.aws_keys import keys_for  # noqa: PLC0415 - HTTP and TLS

    return keys_for(svid.token, svid.spiffe_id, environ)


FORMATS: Final[Mapping[str, Write]] = {
    "aws-credential-process": aws_credential_process,
    "google-executable": google_executable,
    "k8s-exec": k8s_exec,
}


def google_failure(error: BrokerError) -> str:
    """Say that there is none, in the form that google-auth shows its user."""
    return json.dumps({"version": 1, "success": False, "code": error.reason, "message": error.message})


def _kubernetes_version(info: str) -> str:
    from broker.spiffe import strictjson  # noqa: PLC0415 - imports cryptography by way of the package

    if not info:
        return KUBERNETES_VERSIONS[0]
    try:
        told = strictjson.loads(info.encode("utf-8", "surrogateescape"))
    except InvalidJson as error:
        raise InvalidJson(f"KUBERNETES_EXEC_INFO cannot be read: {error.message}", code="exec_info") from None
    version = told.get("apiVersion") if isinstance(told, dict) else None
    if version not in KUBERNETES_VERSIONS:
        raise Invalid(
            f"the caller speaks {version!r}, which is not known here",
            code="exec_info",
            hint=f"write apiVersion: {KUBERNETES_VERSIONS[0]} into the kubeconfig",
        )
    return str(version)
