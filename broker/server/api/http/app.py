"""The HTTP app: which address leads to which endpoint. It is served on the TLS port's own transport, never by itself."""

import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Final
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from broker.server.api.http import actions, approvals, delegations, errors, lease, signals, task_life, tasks
from broker.server.api.http.discovery import Discovery
from broker.server.api.http.introspect import introspect
from broker.server.api.http.keys import keys
from broker.server.api.http.metadata import metadata
from broker.server.api.http.openapi import OpenApi
from broker.server.api.http.revoke import revoke
from broker.server.api.http.services import HttpServices
from broker.server.api.http.token import token

METADATA: Final = "/.well-known/oauth-authorization-server"

_Endpoint = Callable[[Request, HttpServices], Awaitable[Response]]


def create_app(services: HttpServices | None, discovery: Discovery | None = None) -> Starlette:
    """Make the app of the halves that run here: the task half's endpoints, the identity half's discovery."""
    routes = [*(() if services is None else _task_routes(services)), *(discovery.routes() if discovery else ())]
    issuer = services.issuer if services else discovery.issuer if discovery else ""
    if issuer:
        api = OpenApi(issuer)
        routes.append(Route(f"{urlsplit(issuer).path.rstrip('/')}/openapi.json", api.serve, methods=["GET"]))
        api.describe(routes)
    app = Starlette(routes=routes, exception_handlers={HTTPException: errors.on_http_exception})
    # A slash too many is another address: a redirect would send the token a second time.
    app.router.redirect_slashes = False
    return app


def _task_routes(services: HttpServices) -> Sequence[Route]:
    """Where the issuer has a path, everything lies below it, and the metadata as RFC 8414 §3.1 says."""
    below = urlsplit(services.issuer).path.rstrip("/")

    def bound(endpoint: _Endpoint) -> errors.Handler:
        @functools.wraps(endpoint)
        async def handler(request: Request) -> Response:
            return await endpoint(request, services)

        return handler

    return (
        Route(f"{below}/token", errors.oauth(bound(token)), methods=["POST"]),
        Route(f"{below}/introspect", errors.oauth(bound(introspect)), methods=["POST"]),
        Route(f"{below}/revoke", errors.oauth(bound(revoke)), methods=["POST"]),
        Route(f"{below}/keys", errors.plain(bound(keys)), methods=["GET"]),
        Route(METADATA + below, errors.plain(bound(metadata)), methods=["GET"]),
        Route(f"{below}/tasks", errors.plain(bound(task_life.list_own)), methods=["GET"]),
        Route(f"{below}/tasks", errors.plain(bound(task_life.start)), methods=["POST"]),
        Route(f"{below}/tasks/{{task_id}}/children", errors.plain(bound(task_life.start_child)), methods=["POST"]),
        Route(f"{below}/tasks/{{task_id}}/suspend", errors.plain(bound(task_life.suspend)), methods=["POST"]),
        Route(f"{below}/tasks/{{task_id}}/resume", errors.plain(bound(task_life.resume)), methods=["POST"]),
        Route(f"{below}/tasks/{{task_id}}/revoke", errors.plain(bound(task_life.revoke)), methods=["POST"]),
        Route(f"{below}/tasks/{{task_id}}/handoff", errors.plain(bound(task_life.hand_off)), methods=["POST"]),
        Route(f"{below}/tasks/{{task_id}}", errors.plain(bound(tasks.show)), methods=["GET"]),
        Route(f"{below}/tasks/{{task_id}}/complete", errors.plain(bound(task_life.complete)), methods=["POST"]),
        Route(f"{below}/actions", errors.plain(bound(actions.claim)), methods=["POST"]),
        Route(f"{below}/actions/{{action_id}}", errors.plain(bound(actions.settle)), methods=["POST"]),
        Route(f"{below}/delegations", errors.bearer(bound(delegations.create)), methods=["POST"]),
        Route(f"{below}/delegations", errors.bearer(bound(delegations.list_own)), methods=["GET"]),
        Route(f"{below}/delegations/{{delegation_id}}", errors.bearer(bound(delegations.show)), methods=["GET"]),
        Route(f"{below}/delegations/{{delegation_id}}", errors.bearer(bound(delegations.withdraw)), methods=["DELETE"]),
        Route(f"{below}/approvals", errors.bearer(bound(approvals.waiting)), methods=["GET"]),
        Route(f"{below}/approvals/{{approval_id}}", errors.bearer(bound(approvals.show)), methods=["GET"]),
        Route(f"{below}/approvals/{{approval_id}}/approve", errors.bearer(bound(approvals.approve)), methods=["POST"]),
        Route(f"{below}/approvals/{{approval_id}}/deny", errors.bearer(bound(approvals.deny)), methods=["POST"]),
        Route(
            f"{below}/approvals/{{approval_id}}/withdraw", errors.bearer(bound(approvals.withdraw)), methods=["POST"]
        ),
        Route(f"{below}/backchannel-logout", errors.oauth(bound(signals.logout)), methods=["POST"]),
        Route(f"{below}/ssf/events", errors.plain(bound(signals.event)), methods=["POST"]),
        Route(f"{below}/tasks/{{task_id}}/lease", errors.plain(bound(lease.renew)), methods=["PUT"]),
    )
