"""``GET /openapi.json``: OpenAPI 3.1 of every resource of this port, made from the routes and what stands beside their endpoints."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from broker.server.api.http import shapes
from broker.server.api.http.description import Answer, Operation, Parameter, Vocabulary, described, operation_of
from broker.version import __version__

CACHE_SECONDS: Final = 300
FORM: Final = "application/x-www-form-urlencoded"

SCHEMES: Final[Mapping[str, Mapping[str, str]]] = {
    "svid": {"type": "mutualTLS", "description": "an X.509-SVID of this trust domain (RFC 8705 §2)"},
    "user": {
        "type": "http",
        "scheme": "bearer",
        "description": "a user's token, of a client that makes delegations or through which people decide approvals",
    },
    "transmitter": {
        "type": "http",
        "scheme": "bearer",
        "description": "the token of a transmitter's stream, if it has one",
    },
}

_PLACE: Final = re.compile(r"\{([a-z_]+)(?::[a-z]+)?\}")
_REFUSALS: Final[Mapping[Vocabulary, Mapping[int, str]]] = {
    Vocabulary.OAUTH: {
        400: "the request, a token in it, or what it asks for is refused",
        401: "the connection has no client certificate of this trust domain",
        409: "the idempotency key was used for another request, or its answer is over",
        500: "a defect, under a reference number",
        503: "ask again after Retry-After",
    },
    Vocabulary.PLAIN: {
        400: "the request is malformed",
        401: "the connection has no client certificate of this trust domain",
        403: "the caller may not",
        404: "there is no such thing, or it is another's",
        409: "it has moved on",
        500: "a defect, under a reference number",
        503: "ask again after Retry-After",
    },
    Vocabulary.SET: {
        400: "the event is refused",
        401: "the transmitter did not show its token",
        403: "this transmitter's events are fetched",
        503: "send it again after Retry-After",
    },
    Vocabulary.NONE: {},
}
_SCHEMAS: Final = {Vocabulary.OAUTH: "OAuthError", Vocabulary.PLAIN: "Error", Vocabulary.SET: "SetError"}


def document(routes: Iterable[BaseRoute], issuer: str) -> dict[str, Any]:
    """Write the document; a route that nothing was said of is left out."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        operation = operation_of(route.endpoint) if isinstance(route, Route) else None
        if operation is None or not isinstance(route, Route):
            continue
        path = _PLACE.sub(r"{\1}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(path, {})[method.lower()] = _operation(operation, _PLACE.findall(route.path))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Identity broker",
            "version": __version__,
            "description": "OAuth's endpoints and a task's own. Callers are known by the X.509-SVID of their connection.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": _origin(issuer)}],
        "paths": paths,
        "components": {
            "schemas": dict(shapes.COMPONENTS),
            "securitySchemes": {name: dict(scheme) for name, scheme in SCHEMES.items()},
        },
    }


class OpenApi:
    """Serves the document, which is written once: the routes do not change while the server runs."""

    def __init__(self, issuer: str) -> None:
        """Nothing is written before :meth:`describe`."""
        self._issuer = issuer
        self._document: dict[str, Any] = {}

    def describe(self, routes: Iterable[BaseRoute]) -> None:
        """Write the document of these routes."""
        self._document = document(routes, self._issuer)

    @described(
        Operation(
            "get_openapi",
            "This description.",
            vocabulary=Vocabulary.NONE,
            answers={200: Answer("OpenAPI 3.1", {"application/json": shapes.DOCUMENT})},
            public=True,
        )
    )
    async def serve(self, request: Request) -> Response:
        """Give it to anybody."""
        return JSONResponse(self._document, headers={"cache-control": f"public, max-age={CACHE_SECONDS}"})


def _operation(operation: Operation, places: Iterable[str]) -> dict[str, Any]:
    written: dict[str, Any] = {
        "operationId": operation.id,
        "summary": operation.summary,
        "security": [
            {name: []} if name else {} for name in (*(() if operation.public else ("svid",)), *operation.known_by)
        ],
        "responses": {str(status): _answer(answer) for status, answer in operation.answers.items()}
        | _refusals(operation),
    }
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in places]
    parameters += [
        {
            "name": one.name,
            "in": place,
            "required": one.required,
            "description": one.text,
            "schema": dict(one.schema),
        }
        for place, listed in (("header", operation.headers), ("query", operation.query))
        for one in listed
    ]
    if parameters:
        written["parameters"] = parameters
    content = {kind: {"schema": dict(schema)} for kind, schema in operation.body.items()}
    if operation.form:
        content[FORM] = {"schema": _form(operation.form)}
    if content:
        written["requestBody"] = {"required": not operation.form_optional, "content": content}
    return written


def _form(parameters: Iterable[Parameter]) -> dict[str, Any]:
    """A parameter that is not named here refuses the request, and so does one that is sent twice without repeating."""
    known = tuple(parameters)
    return {
        "type": "object",
        "required": [one.name for one in known if one.required],
        "properties": {
            one.name: {"type": "array", "items": dict(one.schema), "description": one.text}
            if one.repeats
            else {**one.schema, "description": one.text}
            for one in known
        },
        "additionalProperties": False,
    }


def _answer(answer: Answer) -> dict[str, Any]:
    written: dict[str, Any] = {"description": answer.text}
    if answer.content:
        written["content"] = {kind: {"schema": dict(schema)} for kind, schema in answer.content.items()}
    return written


def _refusals(operation: Operation) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for status, text in _REFUSALS[operation.vocabulary].items():
        schema = shapes.ref(_SCHEMAS[operation.vocabulary])
        written[str(status)] = {"description": text, "content": {"application/json": {"schema": schema}}}
        if status == 503:
            written[str(status)]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
    return written


def _origin(issuer: str) -> str:
    """Give scheme, host and port: every path of the document is a whole one."""
    return "/".join(issuer.split("/")[:3])
