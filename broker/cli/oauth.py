"""The issuer's endpoints as an OAuth client sees them: found by its metadata, called over mutual TLS with an SVID.

The SVID is this process's own, from the workload socket, or one in files, such as ``broker task run`` gives. Knows no options.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx2

from broker.cli.options import Settings
from broker.errors import BrokerError, Conflict, Invalid, InvalidJson, Misconfigured, Refused, Unavailable
from broker.sdk.tls import client_context
from broker.sdk.workload import Workload
from broker.spiffe import strictjson

MAX_ANSWER: Final = 64 * 1024
WELL_KNOWN: Final = "/.well-known/oauth-authorization-server"
_REFUSED: Final = frozenset(
    {"invalid_client", "invalid_grant", "unauthorized_client", "invalid_scope", "invalid_target", "access_denied"}
)


@dataclass(frozen=True, slots=True)
class SvidFiles:
    """A certificate chain, its key and the roots, as paths of PEM files."""

    svid: str
    key: str
    bundle: str


class Issuer:
    """One issuer's endpoints, by its own word."""

    def __init__(self, client: httpx2.AsyncClient, metadata: Mapping[str, Any]) -> None:
        self._client = client
        self._metadata = metadata

    async def post(self, endpoint: str, form: Mapping[str, str], headers: Mapping[str, str]) -> dict[str, Any]:
        """Send a form to an endpoint by its metadata member; give the JSON answer, empty where there is none.

        Raises:
            BrokerError: what the issuer says, by its code.
        """
        address = self._metadata.get(endpoint)
        if not isinstance(address, str):
            raise Misconfigured(f"the issuer names no {endpoint}", code="endpoint_missing")
        answer = await _asked(self._client, "POST", address, form, headers)
        if answer.status_code == httpx2.codes.OK:
            return _object(answer) if answer.content else {}
        raise _refusal(answer)


def with_issuer(
    settings: Settings, issuer: str, presented: SvidFiles | str, act: Callable[[Issuer], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    """Run ``act`` with the issuer; give what it gives. ``presented``: files, or one of this process's SPIFFE IDs (empty: any)."""

    async def run() -> dict[str, Any]:
        async with _connected(settings, presented) as client:
            return await act(Issuer(client, await _discovered(client, issuer)))

    return asyncio.run(run())


@asynccontextmanager
async def _connected(settings: Settings, presented: SvidFiles | str) -> AsyncIterator[httpx2.AsyncClient]:
    options: dict[str, Any] = {"trust_env": False, "follow_redirects": False, "timeout": settings.timeout}
    if isinstance(presented, SvidFiles):
        async with httpx2.AsyncClient(verify=_of_files(presented), **options) as client:
            yield client
        return
    async with Workload.connect(f"unix:{settings.agent_socket()}", spiffe_id=presented) as me:
        await me.identity(timeout=settings.timeout)
        async with httpx2.AsyncClient(verify=client_context(me), **options) as client:
            yield client


def _of_files(files: SvidFiles) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=files.bundle)
        context.load_cert_chain(files.svid, files.key)
    except (OSError, ssl.SSLError) as error:
        raise Misconfigured(
            f"the SVID's files cannot be used: {error}",
            code="svid_files",
            hint="PEM: the chain with the leaf first, its key, and the roots",
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


async def _discovered(client: httpx2.AsyncClient, issuer: str) -> Mapping[str, Any]:
    """Read the metadata of exactly this issuer (RFC 8414 §3)."""
    url = httpx2.URL(issuer)
    below = url.path.rstrip("/")
    answer = await _asked(client, "GET", str(url.copy_with(path=WELL_KNOWN + below)), None, {})
    if answer.status_code != httpx2.codes.OK:
        raise Unavailable(f"the issuer answers {answer.status_code}, no metadata", code="metadata_unavailable")
    metadata = _object(answer)
    if metadata.get("issuer") != issuer:
        raise Refused(
            "the metadata is another issuer's", code="issuer_mismatch", hint="write the issuer as the server does"
        )
    return metadata


async def _asked(
    client: httpx2.AsyncClient, method: str, url: str, form: Mapping[str, str] | None, headers: Mapping[str, str]
) -> httpx2.Response:
    if not url.startswith("https://"):
        raise Invalid("an issuer and its endpoints are https addresses", code="not_https")
    try:
        return await client.request(method, url, data=None if form is None else dict(form), headers=dict(headers))
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise Unavailable(
            f"{url} cannot be reached: {error}", code="issuer_unavailable", hint="is the server up under that name?"
        ) from None


def _object(answer: httpx2.Response) -> dict[str, Any]:
    try:
        found = strictjson.loads(answer.content, max_bytes=MAX_ANSWER)
    except InvalidJson:
        found = None
    if not isinstance(found, dict):
        raise Unavailable(f"{answer.url} answers no JSON object", code="answer_malformed")
    return found


def _refusal(answer: httpx2.Response) -> BrokerError:
    """Say what an error means (RFC 6749 §5.2)."""
    said = _object(answer)
    error, code = str(said.get("error", "error")), str(said.get("error_code") or said.get("error", "error"))
    message, hint = str(said.get("error_description") or error), str(said.get("hint", ""))
    if answer.status_code == httpx2.codes.CONFLICT:
        return Conflict(message, code=code, hint=hint)
    if answer.status_code >= httpx2.codes.INTERNAL_SERVER_ERROR:
        return Unavailable(message, code=code, hint=hint)
    kind = Refused if error in _REFUSED else Invalid
    return kind(message, code=code, hint=hint)
