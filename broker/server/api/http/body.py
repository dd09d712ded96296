"""One strict reader for the bodies of our own resources: a form, or a JSON object with the same members.

As with forms, a member that is unknown, empty or of another kind refuses the request. In JSON ``authorization_details`` may be
the array itself, and numbers are whole.
"""

from collections.abc import Mapping
from typing import Final

from starlette.requests import Request

from broker.errors import Invalid
from broker.server.api.http.form import MAX_PARAMETERS, Form, parse_form, read_body
from broker.server.api.http.peers import idempotency_key
from broker.server.tasks.requests import check_key
from broker.spiffe import strictjson
from broker.spiffe.strictjson import JsonValue

NONCE: Final = "nonce"
"""The member that is the idempotency key, for who cannot set the header."""
_JSON: Final = "application/json"


async def read_parameters(request: Request, *, allowed: frozenset[str]) -> Form:
    """Read a request's members; none at all where there is no body. Raises Invalid for what has more than one meaning."""
    body = await read_body(request)
    if request.scope.get("query_string"):
        raise Invalid("parameters belong in the body, not in the address", code="parameter_in_query")
    if not body:
        return Form({}, {})
    types = request.headers.getlist("content-type")
    kind = types[0].split(";")[0].strip().lower() if len(types) == 1 else ""
    if kind == _JSON:
        return Form(_members(body, allowed), {})
    if kind != "application/x-www-form-urlencoded":
        raise Invalid(f"the content type must be {_JSON} or application/x-www-form-urlencoded", code="content_type")
    return parse_form(body, allowed=allowed)


async def read_object(request: Request, *, allowed: frozenset[str]) -> dict[str, JsonValue]:
    """Read a JSON object with these members at most, of whatever kind each; raises Invalid."""
    body = await read_body(request)
    if request.scope.get("query_string"):
        raise Invalid("parameters belong in the body, not in the address", code="parameter_in_query")
    types = request.headers.getlist("content-type")
    if len(types) != 1 or types[0].partition(";")[0].strip().lower() != _JSON:
        raise Invalid(f"the content type must be {_JSON}", code="content_type")
    return _object(body, allowed)


def key_of(request: Request, form: Form) -> str:
    """Give the idempotency key, from the header or the member ``nonce``; empty without one; raises Invalid for two."""
    header, nonce = idempotency_key(request), form.get(NONCE)
    if nonce is None:
        return header
    check_key(nonce)
    if header not in {"", nonce}:
        raise Invalid("the idempotency key and the nonce differ", code="invalid_idempotency_key")
    return nonce


def _members(body: bytes, allowed: frozenset[str]) -> Mapping[str, str]:
    return {name: _text(name, member) for name, member in _object(body, allowed).items()}


def _object(body: bytes, allowed: frozenset[str]) -> dict[str, JsonValue]:
    value = strictjson.loads(body)
    if not isinstance(value, dict) or len(value) > MAX_PARAMETERS:
        raise Invalid(f"the body is not a JSON object of at most {MAX_PARAMETERS} members", code="invalid_json")
    if not value.keys() <= allowed:
        # The name is the caller's text: it is not repeated in the answer.
        raise Invalid("a member is not known here", code="parameter_unknown")
    return value


def _text(name: str, value: JsonValue) -> str:
    if isinstance(value, str):
        if not value:
            raise Invalid(f"the member {name} is empty", code="parameter_empty")
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and name == "authorization_details":
        return strictjson.canonical(value).decode()
    raise Invalid(f"the member {name} is neither text nor a whole number", code="parameter_kind")
