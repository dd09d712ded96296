"""What an operator decides about tokens that are not for one service: remote authorization servers, and transactions inside.

Values that are valid once they exist. Nothing configured: no grant leaves, no transaction begins.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Final

from broker.errors import Invalid, Misconfigured, PolicyDenied
from broker.server.tasks.config import Audiences, check_https
from broker.spiffe import SpiffeId, TrustDomain
from broker.tasks import Resource
from broker.tasks.grants import MAX_TTL as MAX_GRANT_TTL
from broker.tasks.grants import MIN_TTL as MIN_GRANT_TTL
from broker.tasks.grants import GrantFormat
from broker.tasks.texts import check_name
from broker.tasks.transactions import MAX_TTL as MAX_TRANSACTION_TTL
from broker.tasks.transactions import MIN_TTL as MIN_TRANSACTION_TTL

DEFAULT_TRANSACTION_TTL: Final = timedelta(seconds=30)
DEFAULT_GRANT_TTL: Final = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class RemoteServer:
    """Another authorization server that takes our grants; raises Misconfigured.

    ``resources`` are what its tokens are for, registered audiences of ours; ``clients`` says what an agent is called there, and who is
    not named is called by its SPIFFE ID.
    """

    issuer: str
    resources: frozenset[Resource]
    formats: frozenset[GrantFormat] = frozenset({GrantFormat.ID_JAG})
    ttl: timedelta = DEFAULT_GRANT_TTL
    clients: Mapping[SpiffeId, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        """Check each field."""
        check_https(self.issuer, "the outward issuer")
        if not self.resources or not self.formats:
            raise Misconfigured(
                f"the outward issuer {self.issuer} has no resources or no formats",
                code="outward_empty",
                hint="name the audiences that its tokens are for",
            )
        if not MIN_GRANT_TTL <= self.ttl <= MAX_GRANT_TTL:
            raise Misconfigured(f"the ttl of grants for {self.issuer} must be 60 to 300 seconds", code="outward_ttl")
        try:
            for name in self.clients.values():
                check_name(name, "client's name")
        except Invalid as error:
            raise Misconfigured(f"a client at {self.issuer}: {error.message}", code="outward_client") from None

    def client_of(self, agent: SpiffeId) -> str:
        """Give what an agent is called there."""
        return self.clients.get(agent, str(agent))

    def resource_of(self, wanted: Resource | None) -> Resource:
        """Give the resource that a grant is for: the one asked for, or the only one; raises PolicyDenied."""
        if wanted is None and len(self.resources) == 1:
            return next(iter(self.resources))
        if wanted is None or wanted not in self.resources:
            raise PolicyDenied(
                "the resource is not one that this authorization server gives tokens for",
                code="invalid_target",
                hint="an operator lists its resources under [[server.outward]]",
            )
        return wanted


class RemoteServers:
    """The configured remote servers. One that is not here does not exist."""

    def __init__(self, servers: Iterable[RemoteServer] = (), audiences: Audiences | None = None) -> None:
        """Index them; raises Misconfigured for one that is there twice, or names what is no audience, or is one itself."""
        known = {each.resource for each in audiences or ()}
        self._by_issuer: dict[str, RemoteServer] = {}
        for server in servers:
            if server.issuer in self._by_issuer:
                raise Misconfigured(f"the outward issuer {server.issuer} is there twice", code="outward_twice")
            if not server.resources <= known:
                raise Misconfigured(
                    f"a resource of the outward issuer {server.issuer} is not a registered audience",
                    code="outward_resource",
                    hint="register it under [[server.audiences]] too: tasks are for registered audiences only",
                )
            if any(resource.text == server.issuer for resource in known):
                # The same word would ask for a task token or for a grant: one of them by mistake.
                raise Misconfigured(
                    f"{server.issuer} is an audience and an outward issuer at once", code="outward_is_audience"
                )
            self._by_issuer[server.issuer] = server

    def __iter__(self) -> Iterator[RemoteServer]:
        """Give each, in the order of the settings."""
        return iter(self._by_issuer.values())

    def __contains__(self, issuer: object) -> bool:
        """Tell whether an issuer is configured, compared byte by byte."""
        return issuer in self._by_issuer

    def find(self, issuer: str, wanted: GrantFormat) -> RemoteServer:
        """Give the server of exactly this issuer, if it takes such grants; raises PolicyDenied(code="invalid_target")."""
        server = self._by_issuer.get(issuer)
        if server is None or wanted not in server.formats:
            raise PolicyDenied(
                "the audience is not an authorization server that takes such grants",
                code="invalid_target",
                hint="an operator names it under [[server.outward]]",
            )
        return server


@dataclass(frozen=True, slots=True)
class TransactionRules:
    """Transaction tokens inside the trust domain; raises Misconfigured.

    Which audiences' tokens may become one is said by each audience; ``replacers`` may then hand a transaction on, each under its own name.
    """

    trust_domain: TrustDomain
    ttl: timedelta = DEFAULT_TRANSACTION_TTL
    replacers: frozenset[SpiffeId] = frozenset()

    def __post_init__(self) -> None:
        """Check the life."""
        if not MIN_TRANSACTION_TTL <= self.ttl <= MAX_TRANSACTION_TTL:
            raise Misconfigured("the ttl of transaction tokens must be 15 to 60 seconds", code="transaction_ttl")

    def require_ours(self, audience: str) -> None:
        """Refuse any audience but our own trust domain, byte by byte; raises PolicyDenied(code="invalid_target")."""
        if audience != self.trust_domain.name:
            raise PolicyDenied(
                "a transaction token is for this trust domain and nothing else",
                code="invalid_target",
                hint="send audience with the trust domain's name",
            )
