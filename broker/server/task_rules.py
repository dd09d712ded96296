"""What the settings say of the task half, as the values that its use cases take."""

from broker.errors import Invalid, Misconfigured
from broker.server.settings import ServerSettings
from broker.server.task_settings import (
    AudienceSettings,
    DetailTypeSettings,
    OutwardSettings,
    SubjectSettings,
    WitIssuerSettings,
)
from broker.server.tasks.config import Audience, SubjectIssuer, TaskDefaults
from broker.server.tasks.detail_types import DetailType
from broker.server.tasks.outward import RemoteServer, TransactionRules
from broker.server.tasks.supervisor import SupervisionRules
from broker.spiffe import strictjson
from broker.spiffe.jose import PublicKey
from broker.tasks import Resource, Supervision
from broker.tasks.authority import OPTIONAL_MEMBERS
from broker.tasks.grants import GrantFormat
from broker.tasks.wit import read_wit_keys


def audience(settings: AudienceSettings) -> Audience:
    """Give a service that tokens are for."""
    return Audience(
        Resource(settings.resource),
        binding=frozenset(settings.binding),
        risk=settings.risk,
        introspectors=frozenset(settings.introspectors),
        token_ttl=None if settings.token_ttl is None else int(settings.token_ttl.total_seconds()),
        transactions=settings.transactions,
        transaction_requesters=frozenset(settings.transaction_requesters),
    )


def detail_type(settings: DetailTypeSettings) -> DetailType:
    """Give a type of authorization details."""
    members = OPTIONAL_MEMBERS if settings.members is None else frozenset(settings.members)
    return DetailType(settings.type, settings.actions, members)


def transaction_rules(settings: ServerSettings) -> TransactionRules:
    """Give the rules of transaction tokens."""
    chosen = settings.transactions
    return TransactionRules(settings.trust_domain, chosen.ttl, frozenset(chosen.replacers))


def remote_server(settings: OutwardSettings) -> RemoteServer:
    """Give an authorization server elsewhere that takes our grants."""
    return RemoteServer(
        settings.issuer,
        frozenset(map(Resource, settings.resources)),
        frozenset(map(GrantFormat, settings.formats)),
        settings.ttl,
        dict(settings.clients),
    )


def subject_issuer(settings: SubjectSettings) -> SubjectIssuer:
    """Give an issuer whose users' tokens are accepted."""
    return SubjectIssuer(
        settings.issuer,
        frozenset(settings.audiences),
        clients=frozenset(settings.clients),
        namespace=settings.namespace,
        ca_path=settings.ca_path,
        required_claims=tuple(sorted(settings.required_claims.items())),
        session_lease=0 if settings.session_lease is None else int(settings.session_lease.total_seconds()),
        delegation_clients=frozenset(settings.delegation_clients),
        delegation_max_age=int(settings.delegation_max_age.total_seconds()),
        approval_clients=frozenset(settings.approval_clients),
        approval_max_age=int(settings.approval_max_age.total_seconds()),
        jwks_url=settings.jwks_url,
    )


def task_defaults(settings: ServerSettings) -> TaskDefaults:
    """Give the defaults and limits of tasks."""
    tasks = settings.tasks
    return TaskDefaults(
        token_ttl=int(tasks.token_ttl.total_seconds()),
        task_ttl=int(tasks.task_ttl.total_seconds()),
        max_task_ttl=int(tasks.max_task_ttl.total_seconds()),
        supervision=Supervision(tasks.supervision),
        allow_unsupervised=tasks.allow_unsupervised,
        max_depth=tasks.max_depth,
        max_children=tasks.max_children,
        max_resumes=tasks.max_resumes,
        max_resumes_per_minute=tasks.max_resumes_per_minute,
        allow_bearer=tasks.allow_bearer,
    )


def supervision_rules(settings: ServerSettings) -> SupervisionRules:
    """Give the leases of tasks and node agents."""
    tasks = settings.tasks
    return SupervisionRules(tasks.lease_ttl, tasks.lapsed_ttl, tasks.agent_lease_ttl, tasks.agent_lost == "end")


def wit_keys_of(settings: WitIssuerSettings) -> dict[str, PublicKey]:
    """Read the keys of a trust domain's workload identity tokens; raises Misconfigured."""
    try:
        return read_wit_keys(strictjson.loads(settings.keys_path.read_bytes()))
    except (OSError, Invalid) as error:
        raise Misconfigured(
            f"{settings.keys_path}: {error}", code="wit_keys", hint="a JWK Set with use wit-svid and a kid for each key"
        ) from None
