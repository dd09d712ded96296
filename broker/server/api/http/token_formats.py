"""``requested_token_type`` at ``/token``: transaction tokens, and grants for other authorization servers (RFC 8693 §2.1).

Each format has parameters of its own, and refuses those of another. Of a JWT it is the audience that says which: a remote server's
issuer asks for a grant, a registered service for a task token. What is granted is the assertions' business.
"""

from typing import Final

from starlette.responses import JSONResponse, Response

from broker.errors import Invalid
from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.form import Form
from broker.server.tasks.assertion_requests import (
    TRANSACTION,
    AssertionRequest,
    GrantRequest,
    HeldToken,
    HeldTransaction,
    IssuedAssertion,
    OwnTask,
    TransactionRequest,
)
from broker.server.tasks.outward import RemoteServers
from broker.server.tasks.subjects import SubjectKind
from broker.tasks import Authority, Resource
from broker.tasks.context import NO_CONTEXT, Context, parse_context
from broker.tasks.grants import GrantFormat

GRANT_TYPE: Final = "urn:ietf:params:oauth:grant-type:token-exchange"
TOKEN_TYPES: Final = "urn:ietf:params:oauth:token-type:"  # noqa: S105 - a namespace of the standard
ACCESS_TOKEN: Final = TOKEN_TYPES + "access_token"
JWT: Final = TOKEN_TYPES + GrantFormat.JWT.value
ID_JAG: Final = TOKEN_TYPES + GrantFormat.ID_JAG.value
TXN_TOKEN: Final = TOKEN_TYPES + TRANSACTION
DELEGATION: Final = "urn:broker:token-type:delegation"
"""Ours: the subject token is the id of a standing delegation."""
SUBJECT_KINDS: Final = {TOKEN_TYPES + kind.value: kind for kind in SubjectKind}

_ALWAYS: Final = frozenset(
    {
        "grant_type",
        "requested_token_type",
        "subject_token",
        "subject_token_type",
        "audience",
        "resource",
        "scope",
        "authorization_details",
        "client_id",
        "task",
    }
)
_OF_TRANSACTIONS: Final = _ALWAYS | {"request_context", "request_details"}


def read_assertion(form: Form, key: str, remotes: RemoteServers) -> AssertionRequest | None:
    """Read a request for another format; None where the form asks for a task token. Raises Invalid."""
    wanted, audiences = form.get("requested_token_type"), form.all("audience")
    if wanted == TXN_TOKEN:
        return _transaction(form, key)
    if wanted == ID_JAG:
        return _grant(form, GrantFormat.ID_JAG, key)
    if wanted == JWT and any(audience in remotes for audience in audiences):
        return _grant(form, GrantFormat.JWT, key)
    return None


def require_only(form: Form, allowed: frozenset[str]) -> None:
    """Refuse a parameter that means nothing for the format that is asked for; raises Invalid."""
    if not form.names() <= allowed:
        raise Invalid("a parameter is not known for this token type", code="parameter_unknown")


def assertion_answer(issued: IssuedAssertion) -> Response:
    """Answer with a token that is no access token (RFC 8693 §2.2.1)."""
    body = {
        "access_token": issued.token,
        "issued_token_type": TOKEN_TYPES + issued.kind,
        "token_type": "N_A",
        "expires_in": int((issued.expires_at - issued.issued_at).total_seconds()),
        "scope": issued.scope,
        "authorization_details": issued.authority.to_json(),
        "task": issued.task_id,
    }
    return JSONResponse(body, headers=NO_STORE)


def _transaction(form: Form, key: str) -> TransactionRequest:
    require_only(form, _OF_TRANSACTIONS)
    token, kind = form.require("subject_token"), form.require("subject_token_type")
    subject: OwnTask | HeldToken | HeldTransaction
    subject = HeldTransaction(token) if kind == TXN_TOKEN and form.get("task") is None else _subject(form, token, kind)
    scope = form.get("scope")
    if scope is None:
        # NOTE(security): a purpose that is not there is not one without bounds (TX10).
        raise Invalid("a transaction token needs a scope", code="invalid_scope", hint="name the actions it is for")
    return TransactionRequest(
        audience=_audience(form),
        subject=subject,
        scope=scope,
        resource=_resource(form),
        authority=_authority(form),
        request_context=_context(form, "request_context"),
        request_details=_context(form, "request_details"),
        idempotency_key=key,
    )


def _grant(form: Form, wanted: GrantFormat, key: str) -> GrantRequest:
    require_only(form, _ALWAYS)
    return GrantRequest(
        format=wanted,
        audience=_audience(form),
        subject=_subject(form, form.require("subject_token"), form.require("subject_token_type")),
        resource=_resource(form),
        scope=form.get("scope") or "",
        authority=_authority(form),
        idempotency_key=key,
    )


def _subject(form: Form, token: str, kind: str) -> OwnTask | HeldToken:
    """Read the subject: a user's token beside a running task, or a task token."""
    task_id = form.get("task")
    if task_id is not None:
        user = SUBJECT_KINDS.get(kind)
        if user is not None:
            return OwnTask(task_id, token, user)
    elif kind in (ACCESS_TOKEN, JWT):
        return HeldToken(token)
    raise Invalid(
        "the subject token's type is not accepted for what is asked for",
        code="subject_token_type",
        hint="bring a task token, or a user's token with the task",
    )


def _audience(form: Form) -> str:
    audiences = form.all("audience")
    if len(audiences) != 1:
        raise Invalid("such a token has exactly one audience", code="invalid_target", hint="send audience once")
    return audiences[0]


def _resource(form: Form) -> Resource | None:
    resources = {Resource(text) for text in form.all("resource")}
    if len(resources) > 1:
        raise Invalid("a token is for exactly one resource", code="invalid_target", hint="send resource once")
    return resources.pop() if resources else None


def _authority(form: Form) -> Authority | None:
    details = form.get("authorization_details")
    return None if details is None else Authority.parse(details)


def _context(form: Form, name: str) -> Context:
    text = form.get(name)
    return NO_CONTEXT if text is None else parse_context(text)
