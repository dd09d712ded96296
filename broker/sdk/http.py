"""``task.http()``: an httpx2 client with mutual TLS and the task's token on every request."""

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import httpx2

from broker.sdk.tls import client_context

if TYPE_CHECKING:
    from broker.sdk.task import Task
    from broker.sdk.workload import Workload

HttpClient = httpx2.AsyncClient


class BrokerAuth(httpx2.Auth):
    """Puts the token of the resource that the URL belongs to into ``Authorization``."""

    def __init__(self, task: "Task") -> None:
        """Hold the task whose tokens are used."""
        self._task = task

    async def async_auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        """Authenticate one request (RFC 6750, section 2.1)."""
        resource = self._task.resource_of(str(request.url))
        request.headers["Authorization"] = f"Bearer {await self._task.token(resource)}"
        yield request


def http_client(workload: "Workload", task: "Task", **options: Any) -> HttpClient:
    """Make the client; ``options`` go to ``httpx2.AsyncClient``. Redirects are not followed: a token has one resource."""
    return httpx2.AsyncClient(
        auth=BrokerAuth(task), verify=client_context(workload), follow_redirects=False, trust_env=False, **options
    )
