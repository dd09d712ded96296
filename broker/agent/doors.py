"""The ways into the agent: the public socket and the admin socket, with the services on each, opened and closed together."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from broker.agent.api.actions import ActionsApi
from broker.agent.api.admin import AdminApi
from broker.agent.api.debug import DebugApi
from broker.agent.api.delegated import DelegatedApi
from broker.agent.api.feed import FeedApi
from broker.agent.api.sds import SdsApi
from broker.agent.api.secrets import SecretNames
from broker.agent.api.tasks import TasksApi
from broker.agent.api.workload import WorkloadApi
from broker.agent.attachments import Attachments
from broker.agent.bootstrap import NodeIdentity
from broker.agent.cache import EstateCache
from broker.agent.denials import Denials
from broker.agent.entitlement import Entitlement
from broker.agent.explain import Explainer
from broker.agent.feed import FeedRelay
from broker.agent.listener import (
    ACTIONS,
    ADMIN,
    DEBUG,
    DELEGATED,
    FEED,
    LOGGER,
    SDS,
    TASKS,
    WORKLOAD,
    AdminSocket,
    PublicSocket,
)
from broker.agent.offline import Offline
from broker.agent.redaction import Redaction
from broker.agent.refusal_log import RefusalLog
from broker.agent.reports import SessionReports
from broker.agent.sessions import Sessions
from broker.agent.settings import AgentSettings, SdsSettings
from broker.agent.svids import SvidKeeper
from broker.agent.token_stream import TokenStream
from broker.agent.upstream import Upstream
from broker.agent.workloads import AdminCaller, Workloads
from broker.attestation.strength import Strengths
from broker.clock import Clock
from broker.telemetry.log import LEVELS, get_logger
from broker.transport.logger import LoggerService


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """What the services stand on. ``health``: parts of the agent that are asked after by name, beside the whole."""

    node: NodeIdentity
    upstream: Upstream
    tokens: TokenStream
    cache: EstateCache
    strengths: Strengths
    workloads: Workloads
    sessions: Sessions
    svids: SvidKeeper
    reports: SessionReports
    attachments: Attachments
    relay: FeedRelay
    offline: Offline
    clock: Clock
    on_over: Callable[[frozenset[str]], None]
    is_ready: Callable[[], bool]
    health: Mapping[str, Callable[[], bool]]


class Doors:
    """Both sockets, over the same sessions and the same record of refusals."""

    def __init__(self, settings: AgentSettings, inside: Inside) -> None:
        """Make the services; nothing listens before :meth:`open`."""
        entitlement = Entitlement(
            inside.workloads, inside.sessions, inside.cache, settings.first_identity_wait.total_seconds()
        )
        show = Redaction(settings.explain_selectors)
        explainer = Explainer(inside.workloads, inside.cache, inside.strengths, inside.clock, show)
        log = RefusalLog(get_logger("agent.refusals"), inside.clock)
        denials = Denials(explainer, log, inside.clock, inside.reports.refused)
        self.public = _public(settings, inside, entitlement, denials)
        self._admin = _admin(settings, inside, entitlement, AdminApi(explainer, denials, inside.sessions))

    async def open(self) -> None:
        """Listen; raises Misconfigured where a socket cannot be made safely, and listens on neither then."""
        await self._admin.start()
        try:
            await self.public.start()
        except BaseException:
            await self._admin.stop(0)
            raise

    async def close(self, grace: float) -> None:
        """Take no more callers, let calls end for ``grace`` seconds, then end them."""
        await asyncio.gather(self.public.stop(grace), self._admin.stop(grace))


def _public(settings: AgentSettings, inside: Inside, entitlement: Entitlement, denials: Denials) -> PublicSocket:
    return PublicSocket(
        settings.socket_path,
        settings.private_dir / "grpc",
        inside.workloads,
        {
            WORKLOAD.name: WorkloadApi(entitlement, inside.svids, inside.cache, inside.clock),
            TASKS.name: TasksApi(
                entitlement,
                inside.svids,
                inside.upstream,
                inside.tokens,
                cache=inside.cache,
                reports=inside.reports,
                attachments=inside.attachments,
                on_over=inside.on_over,
            ),
            ACTIONS.name: ActionsApi(
                entitlement, inside.svids, inside.upstream, reports=inside.reports, on_over=inside.on_over
            ),
            FEED.name: FeedApi(entitlement, inside.relay, inside.cache),
            SDS.name: SdsApi(entitlement, inside.svids, inside.cache, _secret_names(settings.sds)),
        },
        is_ready=inside.is_ready,
        parts=inside.health,
        denials=denials,
    )


def _admin(settings: AgentSettings, inside: Inside, entitlement: Entitlement, api: AdminApi) -> AdminSocket:
    delegates = settings.authorized_delegates
    is_private = settings.admin_socket_path.parent == settings.private_dir
    return AdminSocket(
        settings.admin_socket_path,
        settings.private_dir / "admin-grpc",
        inside.workloads,
        {
            ADMIN.name: api,
            DEBUG.name: DebugApi(inside.node, inside.offline, inside.sessions, inside.svids, inside.clock),
            LOGGER.name: LoggerService(LEVELS, _operator),
            DELEGATED.name: DelegatedApi(
                entitlement, inside.workloads, inside.sessions, inside.svids, inside.cache, delegates=delegates
            ),
        },
        for_delegates=bool(delegates) and not is_private,
        is_private=is_private,
    )


def _operator(caller: AdminCaller) -> str:
    return f"uid:{caller.uid}"


def _secret_names(chosen: SdsSettings) -> SecretNames:
    return SecretNames(
        chosen.default_svid_name,
        chosen.default_bundle_name,
        chosen.default_all_bundles_name,
        chosen.disable_spiffe_cert_validation,
    )
