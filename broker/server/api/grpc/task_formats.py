"""``requested_token_type`` of ``IssueToken``: the formats other than the task token, of an attested workload's own task.

The workload proves itself by its socket, so that no subject token travels: the task's id is enough.
"""

from typing import Final

from broker._proto.broker.server.v1 import tasks_pb2
from broker.errors import Invalid
from broker.server.tasks.assertion_requests import (
    TRANSACTION,
    AssertionRequest,
    GrantRequest,
    IssuedAssertion,
    OwnTask,
    TransactionRequest,
)
from broker.tasks import Authority, Resource
from broker.tasks.context import NO_CONTEXT, parse_context
from broker.tasks.grants import GrantFormat

TOKEN_TYPES: Final = "urn:ietf:params:oauth:token-type:"  # noqa: S105 - a namespace of the standard
_TASK_TOKENS: Final = frozenset({"", TOKEN_TYPES + "access_token"})
_GRANTS: Final = {TOKEN_TYPES + one.value: one for one in GrantFormat}


def read_assertion(request: tasks_pb2.IssueTokenRequest) -> AssertionRequest | None:
    """Read a request for another format; None where a task token is asked for. Raises Invalid."""
    wanted = request.requested_token_type
    if wanted in _TASK_TOKENS:
        if request.audience or request.request_context or request.request_details:
            raise Invalid("a field is not known for this token type", code="parameter_unknown")
        return None
    subject = OwnTask(request.task_id, request.user_token)
    resource = Resource(request.resource) if request.resource else None
    authority = Authority.parse(request.authorization_details) if request.authorization_details else None
    if wanted == TOKEN_TYPES + TRANSACTION:
        if not request.scope:
            raise Invalid("a transaction token needs a scope", code="invalid_scope", hint="name the actions it is for")
        return TransactionRequest(
            audience=request.audience,
            subject=subject,
            scope=request.scope,
            resource=resource,
            authority=authority,
            request_context=parse_context(request.request_context) if request.request_context else NO_CONTEXT,
            request_details=parse_context(request.request_details) if request.request_details else NO_CONTEXT,
            idempotency_key=request.idempotency_key,
        )
    grant = _GRANTS.get(wanted)
    if grant is None or request.request_context or request.request_details:
        raise Invalid("the requested token type is not issued here", code="requested_token_type")
    return GrantRequest(
        format=grant,
        audience=request.audience,
        subject=subject,
        resource=resource,
        scope=request.scope,
        authority=authority,
        idempotency_key=request.idempotency_key,
    )


def written_assertion(issued: IssuedAssertion) -> tasks_pb2.IssuedToken:
    """Write what was issued; it is no access token, and its type says so (RFC 8693 §2.2.1)."""
    return tasks_pb2.IssuedToken(
        access_token=issued.token,
        token_type="N_A",  # noqa: S106 - the type's name
        issued_token_type=TOKEN_TYPES + issued.kind,
        expires_at=int(issued.expires_at.timestamp()),
        scope=issued.scope,
        authorization_details=issued.authority.text(),
        task_id=issued.task_id,
    )
