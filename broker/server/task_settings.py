"""What an operator may set of the task half: whose users, which services, how tasks live. Part of ``[server]``."""

from datetime import timedelta
from pathlib import Path
from typing import Literal

from pydantic import Field

from broker.server.setting_values import Duration
from broker.settings import SpiffeIdText, Table, TrustDomainName


class SubjectSettings(Table):
    """One issuer whose user tokens are accepted."""

    issuer: str = Field(description="the issuer, exactly as in the tokens' iss")
    audiences: tuple[str, ...] = Field(min_length=1, description="a user token must be meant for one of these")
    ca_path: Path | None = Field(default=None, description="PEM roots for this issuer; unset: the machine's own")
    clients: tuple[str, ...] = Field(default=(), description="other clients whose tokens are taken (azp, client_id)")
    namespace: str = Field(default="", description="put before the user, to keep two issuers' users apart")
    required_claims: dict[str, str] = Field(default={}, description="claims that each user token must have so")
    session_lease: Duration | None = Field(
        default=None,
        description="how long a user's session counts after the newest token that was shown of it, where the issuer tells"
        " of no sign-out: beyond, its tasks are suspended until a newer one is; unset: until the tokens and tasks themselves"
        " are over",
    )
    delegation_clients: tuple[str, ...] = Field(
        default=(),
        description="clients (azp, or the only aud) whose user tokens may make standing delegations: the users' own"
        " application, never one whose tokens reach an agent; none: there are no standing delegations",
    )
    delegation_max_age: Duration = Field(
        default=timedelta(minutes=5), description="how long after the sign-in (auth_time) one may be made"
    )
    approval_clients: tuple[str, ...] = Field(
        default=(),
        description="clients (azp, or the only aud) through which people decide approvals: never one whose tokens reach an"
        " agent; none: nobody of this issuer approves anything",
    )
    approval_max_age: Duration = Field(
        default=timedelta(minutes=5), description="how long after the sign-in (auth_time) a person may say yes"
    )
    jwks_url: str = Field(
        default="",
        description="where its keys are; empty: as its configuration document says, which may name another host of the"
        " world, and none in a private network",
    )


class TransmitterSettings(Table):
    """One transmitter of security events (Shared Signals Framework 1.0)."""

    issuer: str = Field(description="the iss of its events, exactly")
    audiences: tuple[str, ...] = Field(min_length=1, description="an event must be meant for one of these")
    subject_issuer: str = Field(default="", description="whose users it speaks of, a subject issuer; empty: its own")
    ca_path: Path | None = Field(default=None, description="PEM roots for its addresses; unset: the machine's own")
    jwks_url: str = Field(default="", description="where its keys are; empty: as its configuration document says")
    poll_url: str = Field(
        default="",
        description="where its events are fetched (RFC 8936); empty: it pushes them to /ssf/events (RFC 8935)",
    )
    poll_every: Duration = Field(default=timedelta(seconds=5), description="how often they are fetched")
    token_file: Path | None = Field(
        default=None, description="a bearer token: what it must show when it pushes, or what is shown where we fetch"
    )


class SsfSettings(Table):
    """Security events about users."""

    streams: tuple[TransmitterSettings, ...] = Field(default=(), description="who is heard; none: nobody")


class WitIssuerSettings(Table):
    """One trust domain whose workload identity tokens (WIT, incubating) are taken at the token endpoint."""

    trust_domain: TrustDomainName = Field(description="its name")
    keys_path: Path = Field(description="JWK Set of the keys that sign its WITs")


class TaskSettings(Table):
    """Tasks and their tokens."""

    token_ttl: Duration = Field(default=timedelta(seconds=180), description="life of a task token, 10s to 300s")
    task_ttl: Duration = Field(default=timedelta(hours=1), description="life of a task whose request does not say")
    max_task_ttl: Duration = Field(default=timedelta(days=1), description="the longest life that a task may ask for")
    max_depth: int = Field(default=5, ge=1, le=16, description="most agents in one chain of tasks that start tasks")
    max_children: int = Field(
        default=100, ge=0, le=100_000, description="most tasks that one task may start over its life; 0: none"
    )
    max_resumes: int = Field(default=20, ge=0, description="how often a workload may resume one task by itself")
    max_resumes_per_minute: int = Field(
        default=3, ge=0, description="how often within a minute; beyond either it stays suspended for an operator"
    )
    supervision: Literal["attached", "lease", "none"] = Field(
        default="attached",
        description="of tasks whose request does not say. attached: ends with the process that started it; lease: lives by"
        " a heartbeat",
    )
    lease_ttl: Duration = Field(
        default=timedelta(seconds=30),
        description="a heartbeat that is missed for longer suspends the task: that of a lease, or of an attached process on"
        " its stream",
    )
    lapsed_ttl: Duration = Field(
        default=timedelta(minutes=10),
        description="how long a task that is suspended so waits to be resumed before it is revoked",
    )
    agent_lease_ttl: Duration = Field(
        default=timedelta(seconds=30),
        description="how long a node agent may be silent before the attached tasks of its workloads are stopped",
    )
    agent_lost: Literal["suspend", "end"] = Field(
        default="suspend",
        description="how they are stopped; end: they are revoked, and the workload sessions end with them",
    )
    allow_unsupervised: bool = Field(default=False, description="whether a caller may ask for supervision none")
    allow_bearer: bool = Field(
        default=False, description="whether a caller may ask for a token bound to nobody, where its audience takes one"
    )
    foreign_starters: tuple[str, ...] = Field(
        default=(),
        description="workloads of other trust domains that may start tasks: SPIFFE IDs, or all below one: …/*",
    )
    trusted_proxies: tuple[SpiffeIdText, ...] = Field(
        default=(), description="proxies that may forward their clients' certificates (x-forwarded-client-cert)"
    )
    wit_issuers: tuple[WitIssuerSettings, ...] = Field(
        default=(), description="trust domains whose workload identity tokens are taken (incubating); none: nobody's"
    )


class PolicySettings(Table):
    """The rules that narrow what tasks and tokens may be."""

    path: Path | None = Field(
        default=None,
        description="Cedar: the policy of all replicas, put in force at the start, the same file for each;"
        " unset: what broker policy push put in force, or the built-in one",
    )


class AudienceSettings(Table):
    """One service that task tokens may be for."""

    resource: str = Field(description="the service's https URI, the tokens' aud")
    binding: tuple[Literal["x5t", "session", "dpop", "window", "bearer"], ...] = Field(
        default=("x5t", "session"),
        min_length=1,
        description="proofs of possession that it accepts; window and bearer are weak",
    )
    risk: Literal["high", "normal", "low"] = Field(
        default="high", description="how its verifiers behave while the feed is stale"
    )
    introspectors: tuple[SpiffeIdText, ...] = Field(default=(), description="who else may introspect its tokens")
    token_ttl: Duration | None = Field(default=None, description="life of its tokens, if not the usual one")
    transactions: bool = Field(
        default=False, description="whether its tokens may become transaction tokens, at their holder's wish"
    )
    transaction_requesters: tuple[SpiffeIdText, ...] = Field(
        default=(), description="which services may do so too, with tokens that they were called with"
    )


class DetailTypeSettings(Table):
    """One registered type of authorization details (RFC 9396)."""

    type: str = Field(description="api or agent_tool")
    actions: tuple[str, ...] = Field(
        default=(), description="what may be asked for, names or families such as ticket.*; unset: anything"
    )
    members: tuple[str, ...] | None = Field(
        default=None,
        description="members that a detail may have besides type, locations and actions; unset: all that are known",
    )


class TransactionSettings(Table):
    """Transaction tokens inside the trust domain (header Txn-Token)."""

    ttl: Duration = Field(default=timedelta(seconds=30), description="life of a transaction token, 15s to 60s")
    replacers: tuple[SpiffeIdText, ...] = Field(
        default=(), description="which services may hand a transaction on under their own name; none: nobody"
    )


class OutwardSettings(Table):
    """Another authorization server that takes grants of ours."""

    issuer: str = Field(description="its issuer, exactly: the grant's only audience")
    resources: tuple[str, ...] = Field(
        min_length=1, description="what its tokens are for; each is an audience here too"
    )
    formats: tuple[Literal["id-jag", "jwt"], ...] = Field(
        default=("id-jag",), min_length=1, description="the grants that it takes: id-jag, or jwt (RFC 7523)"
    )
    ttl: Duration = Field(default=timedelta(seconds=60), description="life of a grant, 60s to 300s")
    clients: dict[SpiffeIdText, str] = Field(
        default={}, description="what an agent is called there, by its SPIFFE ID; who is not named is called by that"
    )
