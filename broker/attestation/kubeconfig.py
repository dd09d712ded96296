"""Reads a kubeconfig: where the API server of its current context is, and as whom it is asked.

YAML as people write it, JSON included, read as data alone: no tags, no anchors, no name twice. What is not known here could
change who is asked, or as whom: it is refused. So is whatever runs a program to get a credential (``exec``,
``auth-provider``): a server that holds authorities runs nothing that a file names.
"""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker.attestation.kubernetes import (
    Fault,
    Server,
    bearer,
    is_host,
    present,
    read_file,
    reading_credentials,
    trusting,
    trusting_the_public,
)
from broker.spiffe.strictyaml import read_yaml

MAX_KUBECONFIG: Final = 1 << 18  # bytes; a cluster and a user with their certificates have some 6 KiB
MAX_DEPTH: Final = 16  # a kubeconfig nests four deep, the extensions in it a little more
_PATH: Final = re.compile(r"(?:/[A-Za-z0-9._~-]+)*/?")
_HTTPS: Final = 443
_HINT: Final = "kube_config_file: kubectl config view --raw --minify --flatten writes one that holds all it needs"
_OWN_ACCOUNT: Final = (
    "make a service account for the broker and give its token, as token, tokenFile or client certificate"
)
_HINTS: Final[Mapping[str, str]] = {
    "exec": f"exec runs a program, which the broker does not: {_OWN_ACCOUNT}",
    "auth-provider": f"auth-provider needs a program of its own: {_OWN_ACCOUNT}",
    "username": f"API servers take no passwords any more: {_OWN_ACCOUNT}",
    "password": f"API servers take no passwords any more: {_OWN_ACCOUNT}",
    "as": "impersonation is not followed: give the credentials of the account itself",
    "proxy-url": "proxies are not followed: name an API server that can be reached",
    "insecure-skip-tls-verify": "give the API server's authority in certificate-authority-data",
}

M = TypeVar("M", bound=BaseModel)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    extensions: Any = None


class _Cluster(_File):
    server: str
    ca: Path | None = Field(default=None, alias="certificate-authority")
    ca_data: str = Field(default="", alias="certificate-authority-data")
    tls_server_name: str = Field(default="", alias="tls-server-name")
    skip: Literal[False] = Field(default=False, alias="insecure-skip-tls-verify")
    compression: Any = Field(default=None, alias="disable-compression")


class _User(_File):
    token: str = ""
    token_file: Path | None = Field(default=None, alias="tokenFile")
    certificate: Path | None = Field(default=None, alias="client-certificate")
    certificate_data: str = Field(default="", alias="client-certificate-data")
    key: Path | None = Field(default=None, alias="client-key")
    key_data: str = Field(default="", alias="client-key-data")


def read_kubeconfig(path: Path, max_answer: int) -> Server:
    """Read the file, and those that it names, relative to it as kubectl does. Raises :class:`Fault`."""
    with reading_credentials(_HINT):
        whole = read_yaml(read_file(path, MAX_KUBECONFIG).decode(), max_depth=MAX_DEPTH)
        context = _entry(whole, "context", whole["current-context"])
        cluster, user = _entry(whole, "cluster", context["cluster"]), _entry(whole, "user", context["user"])
        return _server(_known(_Cluster, cluster), _known(_User, user), path.parent, max_answer)


def _known(model: type[M], entry: Any) -> M:
    try:
        return model.model_validate(entry)
    except ValidationError as error:
        names = [str(one["loc"][0]) for one in error.errors(include_input=False) if one["loc"]]
        hint = next((_HINTS[name] for name in names if name in _HINTS), _HINT)
        raise Fault("credentials", "cannot be asked: the kubeconfig holds what is not followed", hint) from None


def _server(cluster: _Cluster, user: _User, below: Path, max_answer: int) -> Server:
    url = urlsplit(cluster.server)
    host = url.hostname or ""
    if url.scheme != "https" or not is_host(host) or url.query or url.fragment or url.username is not None:
        raise ValueError("not an https address")
    if _PATH.fullmatch(url.path) is None:
        raise ValueError("not a path")
    authorities = _data(cluster.ca_data, cluster.ca, below)
    context = trusting(authorities) if authorities else trusting_the_public()
    certificate = _data(user.certificate_data, user.certificate, below)
    if certificate:
        present(context, certificate, _data(user.key_data, user.key, below))
    token = read_file(below / user.token_file) if user.token_file is not None else user.token.encode()
    return Server(
        host,
        url.port or _HTTPS,
        context,
        bearer(token) if token else None,
        max_answer,
        name=cluster.tls_server_name,
        prefix=url.path.rstrip("/"),
    )


def _entry(whole: Any, kind: str, name: str) -> Any:
    (found,) = (one[kind] for one in whole[f"{kind}s"] if one["name"] == name)
    return found


def _data(encoded: str, path: Path | None, below: Path) -> bytes:
    if encoded:
        return base64.b64decode(encoded, validate=True)
    return b"" if path is None else read_file(below / path)
