"""JSON Schemas (2020-12) of what HTTP endpoints answer, one value each; the OpenAPI document names them as components.

Additive only: a member is added, none is taken away.
"""

from collections.abc import Mapping
from typing import Any, Final

from broker.server.tasks.approvals import MAX_USE_WITHIN
from broker.server.tasks.assertion_requests import TRANSACTION
from broker.tasks.action import MAX_OUTCOME, MAX_STEP, ActionState, Claimed
from broker.tasks.approval import ApprovalState
from broker.tasks.grants import GrantFormat
from broker.tasks.task import State, Supervision

_URN: Final = "urn:ietf:params:oauth:token-type:"
_TEXT: Final = {"type": "string"}
_SECONDS: Final = {"type": "integer", "minimum": 0}
_TIME: Final = {"type": "string", "format": "date-time"}
_URI: Final = {"type": "string", "pattern": "^https://"}
_SPIFFE_ID: Final = {"type": "string", "pattern": "^spiffe://"}
_DIGEST: Final = {"type": "string", "pattern": "^sha-256:"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_TEXTS: Final = {"type": "array", "items": _TEXT}


def _object(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {"type": "object", "required": sorted(required), "properties": properties, **more}


_ACTION: Final = {
    "id": _TEXT,
    "task": _TEXT,
    "state": {"enum": [one.value for one in ActionState]},
    "claimed_at": _TIME,
    "settle_by": _TIME,
    "settled_at": {"oneOf": [_TIME, {"type": "null"}]},
}
_OUTCOME: Final = {"outcome": {"description": f"any JSON of at most {MAX_OUTCOME} bytes; numbers are whole"}}


def ref(name: str) -> dict[str, Any]:
    """Point to a component."""
    return {"$ref": f"#/components/schemas/{name}"}


JWT: Final = {"type": "string", "pattern": r"^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+$"}
TOKEN: Final = ref("Token")
INTROSPECTION: Final = ref("Introspection")
KEY_SET: Final = ref("KeySet")
METADATA: Final = ref("Metadata")
OPENID_CONFIGURATION: Final = ref("OpenIdConfiguration")
TASK: Final = ref("Task")
ACTION: Final = ref("Action")
CLAIMED_ACTION: Final = ref("ClaimedAction")
NEW_ACTION: Final = ref("NewAction")
SETTLEMENT: Final = ref("Settlement")
DELEGATION: Final = ref("Delegation")
DELEGATIONS: Final = ref("Delegations")
NEW_DELEGATION: Final = ref("NewDelegation")
APPROVAL: Final = ref("Approval")
APPROVALS: Final = ref("Approvals")
APPROVING: Final = ref("Approving")
SAYING: Final = ref("Saying")
TASKS: Final = _object({"tasks": {"type": "array", "items": TASK}}, {"next_page_token": _TEXT})
DOCUMENT: Final = {"type": "object", "required": ["openapi", "info", "paths"], "additionalProperties": True}

COMPONENTS: Final[Mapping[str, Any]] = {
    "AuthorizationDetails": {
        "type": "array",
        "minItems": 1,
        "items": _object(
            {"type": _TEXT, "locations": {"type": "array", "items": _URI}, "actions": _TEXTS},
            {"identifier": _TEXT, "datatypes": _TEXTS, "privileges": _TEXTS, "constraints": {"type": "object"}},
            additionalProperties=False,
        ),
    },
    "Act": _object({"sub": _SPIFFE_ID}, {"act": ref("Act")}, additionalProperties=False),
    "Token": _object(
        {
            "access_token": JWT,
            "issued_token_type": {
                "enum": [_URN + kind for kind in ("access_token", TRANSACTION, *(one.value for one in GrantFormat))]
            },
            "token_type": {"enum": ["Bearer", "DPoP", "N_A"]},
            "expires_in": {"type": "integer", "minimum": 1},
            "scope": _TEXT,
            "authorization_details": ref("AuthorizationDetails"),
            "task": _TEXT,
        }
    ),
    "Introspection": {
        "oneOf": [
            _object({"active": {"const": False}}, additionalProperties=False),
            _object(
                {
                    "active": {"const": True},
                    "token_type": {"enum": ["Bearer", "DPoP"]},
                    "iss": _URI,
                    "sub": _TEXT,
                    "client_id": _SPIFFE_ID,
                    "aud": _URI,
                    "exp": _SECONDS,
                    "iat": _SECONDS,
                    "jti": _TEXT,
                    "txn": _TEXT,
                    "scope": _TEXT,
                    "act": ref("Act"),
                    "cnf": {"type": "object", "minProperties": 1},
                    "authorization_details": ref("AuthorizationDetails"),
                    "task": _object(
                        {
                            "id": _TEXT,
                            "root": _TEXT,
                            "epoch": _COUNT,
                            "hop": _COUNT,
                            "purpose": _DIGEST,
                            "authority_hash": _DIGEST,
                        },
                        {"parent": _TEXT, "use": _TEXT},
                    ),
                },
                {"nbf": _SECONDS, "sid": _TEXT, "acr": _TEXT, "auth_time": _SECONDS},
            ),
        ]
    },
    "KeySet": _object(
        {
            "keys": {
                "type": "array",
                "items": _object(
                    {"kty": {"enum": ["EC", "RSA"]}, "kid": _TEXT, "use": _TEXT, "alg": _TEXT},
                    {"crv": _TEXT, "x": _TEXT, "y": _TEXT, "n": _TEXT, "e": _TEXT},
                    additionalProperties=False,
                ),
            }
        }
    ),
    "Metadata": _object(
        {
            "issuer": _URI,
            "token_endpoint": _URI,
            "jwks_uri": _URI,
            "introspection_endpoint": _URI,
            "revocation_endpoint": _URI,
            "grant_types_supported": _TEXTS,
            "response_types_supported": _TEXTS,
            "token_endpoint_auth_methods_supported": _TEXTS,
            "authorization_details_types_supported": _TEXTS,
        },
        {
            "tls_client_certificate_bound_access_tokens": {"type": "boolean"},
            "identity_chaining_requested_token_types_supported": _TEXTS,
            "requested_token_types_supported": _TEXTS,
            "revocation_end_values_supported": _TEXTS,
            "tasks_endpoint": _URI,
            "actions_endpoint": _URI,
            "approvals_endpoint": _URI,
            "openapi_uri": _URI,
            "task_policy": _TEXT,
        },
        # RFC 8414 §2: other specifications add members.
        additionalProperties=True,
    ),
    "OpenIdConfiguration": _object(
        {
            "issuer": _URI,
            "jwks_uri": _URI,
            "authorization_endpoint": _TEXT,
            "response_types_supported": _TEXTS,
            "subject_types_supported": _TEXTS,
            "id_token_signing_alg_values_supported": _TEXTS,
        }
    ),
    "Task": _object(
        {
            "id": _TEXT,
            "root": _TEXT,
            "parent": {"type": ["string", "null"]},
            "depth": _COUNT,
            "user": _TEXT,
            "agent": _SPIFFE_ID,
            "purpose": _TEXT,
            "authorization_details": ref("AuthorizationDetails"),
            "supervision": {"enum": [one.value for one in Supervision]},
            "state": {"enum": [one.value for one in State]},
            "version": {"type": "integer", "minimum": 1},
            "cause": {"type": ["string", "null"]},
            "created_at": _TIME,
            "expires_at": _TIME,
            "ended_at": {"oneOf": [_TIME, {"type": "null"}]},
        },
        {
            "supersedes": {"type": "string", "description": "the task that was handed off to this one"},
            "successor": ref("Task"),
            "revocation": _object(
                {
                    "state": _TEXT,
                    "seq": _COUNT,
                    "expected": _COUNT,
                    "acked": _COUNT,
                    "max_ms": {"type": "number", "minimum": 0},
                }
            ),
        },
    ),
    "NewDelegation": _object(
        {
            "agents": {"type": "array", "minItems": 1, "items": _SPIFFE_ID},
            "authorization_details": ref("AuthorizationDetails"),
            "expires_in": {"type": "integer", "minimum": 1},
            "purpose": _TEXT,
        },
        {"max_task_ttl": _SECONDS, "max_hops": {"type": "integer", "minimum": 1}},
        additionalProperties=False,
    ),
    "Delegation": _object(
        {
            "id": _TEXT,
            "user": _TEXT,
            "issuer": _URI,
            "client": _TEXT,
            "state": {"enum": ["standing", "withdrawn", "expired"]},
            "agents": {"type": "array", "items": _SPIFFE_ID},
            "authorization_details": ref("AuthorizationDetails"),
            "purpose": _TEXT,
            "max_task_ttl": _SECONDS,
            "max_hops": _COUNT,
            "created_at": _TIME,
            "expires_at": _TIME,
            "ended_at": {"anyOf": [_TIME, {"type": "null"}]},
            "cause": {"type": ["string", "null"]},
        }
    ),
    "Delegations": _object({"delegations": {"type": "array", "items": ref("Delegation")}}, {"next": _TEXT}),
    "NewAction": _object(
        {"token": JWT, "action": _TEXT, "step": {"type": "string", "minLength": 1, "maxLength": MAX_STEP}},
        {"identifier": _TEXT, "parameter_digest": _DIGEST, "enforced": _TEXTS},
        additionalProperties=False,
    ),
    "Action": _object(_ACTION, _OUTCOME),
    "ClaimedAction": _object({"result": {"enum": [one.value for one in Claimed]}, **_ACTION}, _OUTCOME),
    "Settlement": _object({"state": {"enum": ["completed", "released"]}}, _OUTCOME, additionalProperties=False),
    "Approval": _object(
        {
            "id": _TEXT,
            "state": {"enum": [one.value for one in ApprovalState]},
            "task": _TEXT,
            "agent": _SPIFFE_ID,
            "user": {"type": "string", "description": "whom the agent acts for"},
            "issuer": _URI,
            "audience": _URI,
            "authorization_details": ref("AuthorizationDetails"),
            "scope": _TEXT,
            "purpose": _TEXT,
            "parameter_digest": {"oneOf": [_DIGEST, {"type": "null"}]},
            "rules": {**_TEXTS, "description": "the policy's rules that want a person"},
            "created_at": _TIME,
            "expires_at": _TIME,
            "decided_at": {"oneOf": [_TIME, {"type": "null"}]},
            "decided_by": {"type": ["string", "null"]},
            "reason": {"type": ["string", "null"]},
            "approved_until": {"oneOf": [_TIME, {"type": "null"}]},
            "used_at": {"oneOf": [_TIME, {"type": "null"}]},
        }
    ),
    "Approvals": _object({"approvals": {"type": "array", "items": ref("Approval")}}, {"next": _TEXT}),
    "Saying": _object({}, {"reason": _TEXT}, additionalProperties=False),
    "Approving": _object(
        {},
        {"reason": _TEXT, "use_within": {"type": "integer", "minimum": 0, "maximum": MAX_USE_WITHIN}},
        additionalProperties=False,
    ),
    "SetError": _object(
        {
            "err": {
                "enum": [
                    "invalid_request",
                    "invalid_key",
                    "invalid_issuer",
                    "invalid_audience",
                    "authentication_failed",
                    "access_denied",
                ]
            },
            "description": _TEXT,
        }
    ),
    "Error": _object(
        {"error": {"type": "string", "description": "a stable code"}},
        {"error_description": _TEXT, "error_code": {"type": "string", "description": "what exactly"}, "hint": _TEXT},
    ),
    "OAuthError": _object(
        {
            "error": {
                "enum": [
                    "invalid_request",
                    "invalid_client",
                    "invalid_grant",
                    "unauthorized_client",
                    "unsupported_grant_type",
                    "unsupported_token_type",
                    "use_dpop_nonce",
                    "invalid_dpop_proof",
                    "invalid_scope",
                    "invalid_target",
                    "invalid_authorization_details",
                    "authorization_pending",
                    "slow_down",
                    "access_denied",
                    "temporarily_unavailable",
                    "server_error",
                ]
            },
            "error_description": {"type": "string", "pattern": r"^[\x20-\x21\x23-\x5b\x5d-\x7e]*$"},
        },
        {
            "error_code": {"type": "string", "description": "what exactly"},
            "hint": _TEXT,
            "approval": {"type": "string", "description": "what is waited for"},
        },
    ),
}
"""Every named shape."""
