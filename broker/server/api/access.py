"""Who may call which method: one table. A method without a line is denied to everybody.

The roles are SPIRE's: ``any`` (no authentication), ``local`` (root or the server's own user on the admin socket),
``admin`` (an SVID with an admin entry, or named in ``admin_ids``), ``agent`` (an attested node agent's SVID, judged
against its node at each call), ``downstream`` (an SVID with a downstream entry); and ours: ``peer`` (any SVID of the own
trust domain; an agent's only while it would count as an agent).
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final, TypeAlias

from broker.errors import Refused
from broker.server.identity.directory import Directory
from broker.server.identity.nodes import AGENT_PATH, AgentRefused, Nodes
from broker.spiffe import SpiffeId, TrustDomain, X509Svid
from broker.transport.peercred import KernelPeer
from broker.transport.tls import Anonymous, SvidPeer


class Role(StrEnum):
    """What a caller can be to a method."""

    ANY = "any"
    LOCAL = "local"
    ADMIN = "admin"
    AGENT = "agent"
    DOWNSTREAM = "downstream"
    PEER = "peer"


@dataclass(frozen=True, slots=True)
class LocalPeer:
    """A process on the admin socket that runs as root or as the server itself; made by :func:`admit_local` only."""

    uid: int
    pid: int


Caller: TypeAlias = LocalPeer | Anonymous | SvidPeer

_OPEN: Final = frozenset({Role.ANY})
_OPERATORS: Final = frozenset({Role.LOCAL, Role.ADMIN})
_LOCAL: Final = frozenset({Role.LOCAL})
_AGENTS: Final = frozenset({Role.AGENT})
_DOWNSTREAM: Final = frozenset({Role.DOWNSTREAM})
_LISTENERS: Final = frozenset({Role.PEER, Role.LOCAL})


def _lines(service: str, roles: frozenset[Role], *methods: str) -> dict[str, frozenset[Role]]:
    return {f"/{service}/{method}": roles for method in methods}


_AGENT = "spire.api.server.agent.v1.Agent"
_BUNDLE = "spire.api.server.bundle.v1.Bundle"
_ENTRY = "spire.api.server.entry.v1.Entry"
_TRUST_DOMAIN = "spire.api.server.trustdomain.v1.TrustDomain"
_SVID = "spire.api.server.svid.v1.SVID"
_LOCAL_AUTHORITY = "spire.api.server.localauthority.v1.LocalAuthority"

METHODS: Final[Mapping[str, frozenset[Role]]] = {
    **_lines(_AGENT, _OPEN, "AttestAgent"),
    **_lines(_AGENT, _AGENTS, "RenewAgent", "PostStatus"),
    **_lines(
        _AGENT, _OPERATORS,
        "CountAgents", "ListAgents", "GetAgent", "DeleteAgent", "BanAgent", "CreateJoinToken",
    ),
    **_lines(_BUNDLE, _OPEN, "GetBundle"),
    **_lines(
        _BUNDLE, _OPERATORS,
        "AppendBundle", "CountBundles", "ListFederatedBundles", "BatchCreateFederatedBundle",
        "BatchUpdateFederatedBundle", "BatchSetFederatedBundle", "BatchDeleteFederatedBundle",
    ),
    **_lines(_BUNDLE, _OPERATORS | _AGENTS, "GetFederatedBundle"),
    **_lines(
        _ENTRY, _OPERATORS,
        "CountEntries", "ListEntries", "GetEntry", "BatchCreateEntry", "BatchUpdateEntry", "BatchDeleteEntry",
    ),
    **_lines(_ENTRY, _AGENTS, "GetAuthorizedEntries", "SyncAuthorizedEntries"),
    **_lines(_SVID, _OPERATORS, "MintX509SVID", "MintJWTSVID"),
    **_lines(_SVID, _AGENTS, "BatchNewX509SVID", "NewJWTSVID"),
    **_lines(_SVID, _DOWNSTREAM, "NewDownstreamX509CA"),
    **_lines(_BUNDLE, _DOWNSTREAM, "PublishJWTAuthority"),
    **_lines(
        _LOCAL_AUTHORITY, _OPERATORS,
        "GetJWTAuthorityState", "PrepareJWTAuthority", "ActivateJWTAuthority", "TaintJWTAuthority",
        "RevokeJWTAuthority", "GetX509AuthorityState", "PrepareX509Authority", "ActivateX509Authority",
        "TaintX509Authority", "RevokeX509Authority", "TaintX509UpstreamAuthority", "RevokeX509UpstreamAuthority",
    ),
    **_lines(
        "broker.server.v1.Authorities", _OPERATORS,
        "ListAuthorities", "PrepareAuthority", "ActivateAuthority", "TaintAuthority", "RevokeAuthority",
    ),
    **_lines(
        _TRUST_DOMAIN, _OPERATORS,
        "ListFederationRelationships", "GetFederationRelationship", "BatchCreateFederationRelationship",
        "BatchUpdateFederationRelationship", "BatchDeleteFederationRelationship", "RefreshBundle",
    ),
    **_lines(
        "broker.server.v1.Entries", _OPERATORS,
        "BatchCreateEntry", "BatchUpdateEntry", "GetEntry", "ListEntries", "CountEntries",
    ),
    **_lines("broker.server.v1.Revocations", _OPERATORS, "RevokeSvids"),
    **_lines("broker.server.v1.Watch", _AGENTS, "Watch"),
    **_lines("broker.server.v1.Sessions", _AGENTS, "ReportSessions"),
    **_lines(
        "broker.server.v1.Tasks", _AGENTS,
        "StartTask", "IssueToken", "IssueTokens", "CompleteTask", "RenewLease", "AttachTask", "StartChildTask", "ChangeOwnTask",
    ),
    **_lines("broker.server.v1.Tasks", _OPERATORS, "GetTask", "ListTasks", "RevokeTask", "ChangeTask"),
    **_lines("broker.server.v1.Actions", _AGENTS, "ClaimAction", "SettleAction"),
    **_lines("broker.server.v1.Policies", _OPERATORS, "GetPolicy", "PushPolicy", "ExplainDecision"),
    **_lines(
        "broker.server.v1.Delegations", _OPERATORS,
        "CreateDelegation", "GetDelegation", "ListDelegations", "RevokeDelegation",
    ),
    **_lines(
        "broker.server.v1.Approvals", _OPERATORS,
        "ListApprovals", "GetApproval", "ApproveApproval", "DenyApproval", "WithdrawApproval",
    ),
    **_lines("broker.server.v1.Stops", _OPERATORS, "StopTasks", "DisableUser", "EnableUser"),
    **_lines("broker.server.v1.Feed", _LISTENERS, "Subscribe", "FindLeaf"),
    **_lines("spire.api.server.debug.v1.Debug", _LOCAL, "GetInfo"),
    **_lines("spire.api.server.logger.v1.Logger", _LOCAL, "GetLogger", "SetLogLevel", "ResetLogLevel"),
    **_lines("grpc.health.v1.Health", _LOCAL, "Check", "List", "Watch"),
    **_lines("grpc.reflection.v1.ServerReflection", _LOCAL, "ServerReflectionInfo"),
    **_lines("grpc.reflection.v1alpha.ServerReflection", _LOCAL, "ServerReflectionInfo"),
}  # fmt: skip


_SPIRES: Final = "/spire.api."
_WHO_MAY: Final = "docs/reference/roles.md says which roles may"
REQUESTS_IN_MESSAGES: Final = frozenset({"/broker.server.v1.Tasks/IssueTokens"})
"""Streams whose messages are requests of their own: the table is asked before each."""


@dataclass(frozen=True, slots=True)
class Access:
    """Decides by the table, the registry and the nodes of this moment."""

    trust_domain: TrustDomain
    directory: Directory
    nodes: Nodes
    admin_ids: Collection[SpiffeId]

    def checks(self) -> Mapping[str, Callable[[Caller], None]]:
        """Give a check per method, for the guard of a gRPC server; each raises Refused."""
        return {path: partial(self._require, path) for path in METHODS}

    def _require(self, path: str, caller: Caller) -> None:
        roles = METHODS[path]
        try:
            allowed = self.allows(caller, roles)
        except AgentRefused as error:
            # SPIRE says the same words to everybody, and what is wrong with an agent in the details.
            why = f"{error.message}; {error.hint}" if error.hint else error.message
            raise AgentRefused(_denied(path), code=error.reason, hint=why) from None
        if allowed:
            return
        if isinstance(caller, SvidPeer) and Role.AGENT in roles and path.startswith(_SPIRES):
            raise AgentRefused(_denied(path), code="agent_not_attested", hint=_WHO_MAY)
        raise Refused(_denied(path), code="access_denied", hint=_WHO_MAY)

    def allows(self, caller: Caller, roles: frozenset[Role]) -> bool:
        """Tell whether the caller has one of the roles; raises Refused, with what is wrong with it, for an agent that is none."""
        if Role.ANY in roles:
            return True
        match caller:
            case LocalPeer():
                return Role.LOCAL in roles
            case SvidPeer(svid):
                return self._holds(svid, roles)
        return False

    def _holds(self, svid: X509Svid, roles: frozenset[Role]) -> bool:
        if svid.id.trust_domain != self.trust_domain:
            return False
        if svid.id.path.startswith(f"{AGENT_PATH}/"):
            # NOTE(security): raises for a banned, evicted or superseded agent; the handshake cannot know that.
            self.nodes.require_active(svid)
            if Role.AGENT in roles:
                return True
        if Role.PEER in roles:
            return True
        is_admin, is_downstream = self.directory.privileges(svid.id)
        return (Role.ADMIN in roles and (is_admin or svid.id in self.admin_ids)) or (
            Role.DOWNSTREAM in roles and is_downstream
        )


def admit_local(peer: KernelPeer) -> LocalPeer:
    """Admit a process to the admin socket; raises Refused for any user but root and the server's own."""
    if peer.uid not in {0, os.geteuid()}:
        raise Refused("only root and the server's own user may administer it here", code="access_denied")
    return LocalPeer(peer.uid, peer.pid)


def _denied(path: str) -> str:
    return f"authorization denied for method {path}"  # SPIRE's words


def agent_of(caller: Caller) -> X509Svid:
    """Give the SVID of a caller that the table admitted as an agent."""
    if not isinstance(caller, SvidPeer):
        raise Refused("only a node agent may call this method", code="access_denied")
    return caller.svid


def name_of(caller: Caller) -> str:
    """Name a caller for the audit log."""
    match caller:
        case LocalPeer(uid=uid):
            return f"uid:{uid}"
        case SvidPeer(svid):
            return str(svid.id)
        case _:
            return "anonymous"
