"""``task.http()``: an httpx2 client with mutual TLS and the task's token on every request, with a DPoP proof where asked."""

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Final

import httpx2

from broker.errors import Unavailable
from broker.sdk.dpop import ProofKey
from broker.sdk.tls import client_context

if TYPE_CHECKING:
    from broker.sdk.task import Task
    from broker.sdk.workload import Workload

HttpClient = httpx2.AsyncClient
UNAUTHORIZED: Final = 401


class BrokerAuth(httpx2.Auth):
    """Puts the token of the resource that the URL belongs to into ``Authorization``.

    With a key, tokens are bound to it and each request has a proof of its own, with the nonce that its service wants.
    """

    def __init__(self, task: "Task", key: ProofKey | None = None) -> None:
        """Hold the task whose tokens are used, and the key that proves them."""
        self._task = task
        self._key = key
        self._nonces: dict[str, str] = {}

    async def async_auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        """Authenticate one request (RFC 6750, section 2.1; RFC 9449, section 7.1).

        A token that the service refuses is asked for anew, once: its task may have been suspended since, and gone on. Raises
        Refused where there is none any more.
        """
        resource = self._task.resource_of(str(request.url))
        token = await self._task.token(resource, key=self._key)
        may_renew = may_prove = True
        while True:
            nonce = self._prove(request, resource, token)
            response = yield request
            self._nonces[resource] = response.headers.get("dpop-nonce", nonce)
            if response.status_code != UNAUTHORIZED or not isinstance(request.stream, httpx2.ByteStream):
                return  # a body that was a stream is gone: it cannot be sent again
            if may_prove and self._nonces[resource] != nonce:
                may_prove = False  # RFC 9449 §9: once more with the nonce of the answer
                continue
            before, token = token, await self._renewed(resource, token) if may_renew else token
            if token == before:
                return
            may_renew = False

    async def _renewed(self, resource: str, token: str) -> str:
        """Give another token for one that was refused; the same one where nobody can say whether there is another."""
        self._task.forget(token)
        try:
            return await self._task.token(resource, key=self._key)
        except Unavailable:
            return token

    def _prove(self, request: httpx2.Request, resource: str, token: str) -> str:
        """Put the token into the request, and the proof where there is a key; give the nonce that was used."""
        if self._key is None:
            request.headers["Authorization"] = f"Bearer {token}"
            return ""
        nonce = self._nonces.get(resource, "")
        request.headers["Authorization"] = f"DPoP {token}"
        request.headers["DPoP"] = self._key.proof(request.method, str(request.url), token=token, nonce=nonce)
        return nonce


def http_client(workload: "Workload", task: "Task", *, key: ProofKey | None = None, **options: Any) -> HttpClient:
    """Make the client; ``options`` go to ``httpx2.AsyncClient``. Redirects are not followed: a token has one resource."""
    return httpx2.AsyncClient(
        auth=BrokerAuth(task, key), verify=client_context(workload), follow_redirects=False, trust_env=False, **options
    )
