"""Grants for another authorization server: a user's word and a task, said to one remote issuer and nobody else.

Two formats, each with a type of its own: the Identity Assertion JWT Authorization Grant (draft-ietf-oauth-identity-assertion-authz-grant,
``oauth-id-jag+jwt``) and the plain JWT authorization grant (RFC 7523 §2.1, as in draft-ietf-oauth-identity-chaining). ``aud`` is one
issuer, the life 60 to 300 seconds, ``jti`` new each time: the remote server takes each once. Nothing of ours accepts one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from broker.spiffe import SpiffeId
from broker.spiffe.strictjson import JsonValue
from broker.tasks.actors import nested_act
from broker.tasks.authority import Authority
from broker.tasks.resource import Resource
from broker.tasks.task import Task
from broker.tasks.transactions import whole_seconds

MIN_TTL: Final = timedelta(seconds=60)
MAX_TTL: Final = timedelta(seconds=300)


class GrantFormat(StrEnum):
    """What may be asked for; the value is the end of its token type URN (RFC 8693 §3)."""

    ID_JAG = "id-jag"
    JWT = "jwt"


HEADER_TYPES: Final[Mapping[GrantFormat, str]] = MappingProxyType(
    {GrantFormat.ID_JAG: "oauth-id-jag+jwt", GrantFormat.JWT: "JWT"}
)
"""``typ`` of each. RFC 7523 names none for a grant, and servers take what every JWT library writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantClaims:
    """What a grant says. Times are whole seconds; ``client_id`` is the agent's name at the remote server."""

    iss: str
    aud: str
    client_id: str
    resource: Resource
    authority: Authority
    jti: str
    txn: str
    iat: int
    exp: int

    def to_payload(self, task: Task, act: Sequence[SpiffeId]) -> dict[str, JsonValue]:
        """Give the payload, for the task's user, with the chain of agents, the present one first."""
        delegation = task.delegation
        payload: dict[str, JsonValue] = {
            "iss": self.iss,
            "sub": task.user,
            "aud": self.aud,
            "client_id": self.client_id,
            "jti": self.jti,
            "txn": self.txn,
            "iat": self.iat,
            "exp": self.exp,
            "resource": self.resource.text,
            "scope": self.authority.scope(),
            "authorization_details": self.authority.to_json(),
            "act": nested_act(act),
        }
        if delegation.acr is not None:
            payload["acr"] = delegation.acr
        if delegation.auth_time is not None:
            payload["auth_time"] = whole_seconds(delegation.auth_time)
        return payload
