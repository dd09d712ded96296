"""``spire.api.server.agent.v1.Agent``: node attestation, renewal, and the administration of nodes."""

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Final

from broker._proto.google.protobuf import empty_pb2
from broker._proto.service import Context, ServiceBinding
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.types import agent_pb2 as types_pb2
from broker._proto.spire.api.types import jointoken_pb2, x509svid_pb2
from broker.attestation.contract import Evidence
from broker.errors import Invalid
from broker.server.api.access import Caller, agent_of, name_of
from broker.server.api.grpc import identities
from broker.server.api.grpc.conversation import Conversation
from broker.server.api.grpc.convert import (
    agent_message,
    apply_mask,
    seconds,
    selector_filter,
    spiffe_id_message,
)
from broker.server.api.grpc.identities import id_in, reading
from broker.server.api.grpc.paging import pages
from broker.server.api.rate_limits import Limits
from broker.server.identity.admission import Admission, AgentSvid
from broker.server.identity.filters import NodeFilter, SetFilter, node_order, node_token
from broker.server.identity.join_tokens import JoinTokens
from broker.server.identity.nodes import Nodes
from broker.spiffe import Selector, SpiffeId, TrustDomain

BINDING: Final = ServiceBinding.of(agent_pb2.DESCRIPTOR, "Agent")
# RFC 3339 as SPIRE's command line writes it, or with an offset.
_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9:.]{5,18} ?(?:Z|[+-][0-9]{2}:?[0-9]{2})(?: (?:[A-Z]{1,5}|[+-][0-9]{2,4}))?"
)


class Agent:
    """The service, over its use cases."""

    def __init__(
        self,
        nodes: Nodes,
        admission: Admission,
        join_tokens: JoinTokens,
        *,
        limits: Limits,
        trust_domain: TrustDomain,
    ) -> None:
        self._nodes = nodes
        self._admission = admission
        self._join_tokens = join_tokens
        self._limits = limits
        self._trust_domain = trust_domain

    # ---- for agents

    async def AttestAgent(  # noqa: N802  # the name on the wire
        self, request: AsyncIterator[agent_pb2.AttestAgentRequest], context: Context, caller: Caller
    ) -> AsyncIterator[agent_pb2.AttestAgentResponse]:
        """Params, then a response to each challenge; challenges, then the result."""
        await self._limits.attest.take(caller, context)
        first = await anext(request, None)
        if first is None:
            raise Invalid("failed to receive request from stream: EOF", code="attestation_order")
        with reading("malformed param"):
            _check_params(first)
        data = first.params.data
        conversation = Conversation[AgentSvid](request)
        run = conversation.run(
            self._admission.attest(
                Evidence(data.type, data.payload), first.params.params.csr, conversation.challenge_with
            )
        )
        async for step in run:
            if isinstance(step, bytes):
                yield agent_pb2.AttestAgentResponse(challenge=step)
            else:
                result = agent_pb2.AttestAgentResponse.Result(svid=_svid_message(step), reattestable=step.reattestable)
                yield agent_pb2.AttestAgentResponse(result=result)

    async def RenewAgent(  # noqa: N802
        self, request: agent_pb2.RenewAgentRequest, context: Context, caller: Caller
    ) -> agent_pb2.RenewAgentResponse:
        """Sign anew for an agent that cannot attest again."""
        await self._limits.certificates.take(caller, context)
        asked = request.params.csr if request.HasField("params") else None
        svid = await self._admission.renew(agent_of(caller), asked)
        return agent_pb2.RenewAgentResponse(svid=_svid_message(svid))

    async def PostStatus(  # noqa: N802
        self, request: agent_pb2.PostStatusRequest, context: Context, caller: Caller
    ) -> agent_pb2.PostStatusResponse:
        """Note the agent's version; an agent that does not say it keeps the one it has."""
        await self._limits.status.take(caller, context)
        if request.agent_version:
            await self._nodes.report(agent_of(caller), request.agent_version)
        return agent_pb2.PostStatusResponse()

    # ---- for operators

    async def CountAgents(  # noqa: N802
        self, request: agent_pb2.CountAgentsRequest, context: Context, caller: Caller
    ) -> agent_pb2.CountAgentsResponse:
        """Count nodes."""
        return agent_pb2.CountAgentsResponse(count=self._nodes.count(_filter(request.filter)))

    async def ListAgents(  # noqa: N802
        self, request: agent_pb2.ListAgentsRequest, context: Context, caller: Caller
    ) -> agent_pb2.ListAgentsResponse:
        """List nodes by SPIFFE ID."""
        size = max(0, request.page_size)
        page = self._nodes.find(_filter(request.filter), size, node_token(request.page_token) if size else "")
        mask = request.output_mask if request.HasField("output_mask") else None
        shown = [apply_mask(agent_message(node), mask) if mask else agent_message(node) for node in page.items]
        if not size:
            return agent_pb2.ListAgentsResponse(agents=shown)
        fitting, more = next(pages(shown, size))
        following = node_order(page.items[len(fitting) - 1]) if more else page.next
        return agent_pb2.ListAgentsResponse(agents=fitting, next_page_token=following)

    async def GetAgent(  # noqa: N802
        self, request: agent_pb2.GetAgentRequest, context: Context, caller: Caller
    ) -> types_pb2.Agent:
        """Show one node."""
        message = agent_message(self._nodes.get(self._agent_id(request)))
        if request.HasField("output_mask"):
            apply_mask(message, request.output_mask)
        return message

    async def DeleteAgent(  # noqa: N802
        self, request: agent_pb2.DeleteAgentRequest, context: Context, caller: Caller
    ) -> empty_pb2.Empty:
        """Forget a node: its agent may attest again."""
        await self._nodes.delete(self._agent_id(request), name_of(caller))
        return empty_pb2.Empty()

    async def BanAgent(  # noqa: N802
        self, request: agent_pb2.BanAgentRequest, context: Context, caller: Caller
    ) -> empty_pb2.Empty:
        """Refuse a node's agent from now on."""
        await self._nodes.ban(self._agent_id(request), name_of(caller))
        return empty_pb2.Empty()

    async def CreateJoinToken(  # noqa: N802
        self, request: agent_pb2.CreateJoinTokenRequest, context: Context, caller: Caller
    ) -> jointoken_pb2.JoinToken:
        """Make a join token; its text is in this answer and nowhere else."""
        if request.ttl < 1:
            raise Invalid("ttl is required, you must provide one", code="invalid_ttl")
        alias = None
        if request.HasField("agent_id"):
            with reading("invalid agent ID"):
                alias = identities.workload(identities.spiffe_id_of(request.agent_id), self._trust_domain)
        token = await self._join_tokens.create(
            name_of(caller), ttl=timedelta(seconds=request.ttl), chosen=request.token, agent_id=alias
        )
        return jointoken_pb2.JoinToken(value=token.value, expires_at=seconds(token.expires_at))

    def _agent_id(self, request: object) -> SpiffeId:
        with reading("invalid agent ID"):
            return identities.agent(id_in(request, "id"), self._trust_domain)


def _check_params(message: agent_pb2.AttestAgentRequest) -> None:
    params = message.params
    for is_there, what in (
        (message.WhichOneof("step") == "params", "params"),
        (params.HasField("data"), "attestation data"),
        (params.HasField("params"), "X509-SVID parameters"),
        (params.params.csr, "CSR"),
        (params.data.type, "attestation data type"),
        (params.data.payload, "attestation data payload"),
    ):
        if not is_there:
            raise Invalid(f"missing {what}", code="attestation_order")


def _svid_message(svid: AgentSvid) -> x509svid_pb2.X509SVID:
    return x509svid_pb2.X509SVID(
        cert_chain=svid.chain_der, id=spiffe_id_message(svid.spiffe_id), expires_at=seconds(svid.expires_at)
    )


def _filter(message: agent_pb2.ListAgentsRequest.Filter | agent_pb2.CountAgentsRequest.Filter) -> NodeFilter:
    return NodeFilter(
        attestation_type=message.by_attestation_type or None,
        selectors=_selectors(message),
        banned=message.by_banned.value if message.HasField("by_banned") else None,
        reattestable=message.by_can_reattest.value if message.HasField("by_can_reattest") else None,
        expires_before=_moment(message.by_expires_before) if message.by_expires_before else None,
    )


def _selectors(
    message: agent_pb2.ListAgentsRequest.Filter | agent_pb2.CountAgentsRequest.Filter,
) -> SetFilter[Selector] | None:
    if not message.HasField("by_selector_match"):
        return None
    with reading("failed to parse selectors"):
        return selector_filter(message.by_selector_match)


def _moment(text: str) -> datetime:
    # SPIRE's command line sends Go's "2006-01-02 15:04:05 -0700 -07".
    if _TIME.fullmatch(text) is None:
        raise Invalid("by_expires_before is not a time", code="invalid_time", hint="write 2026-01-31T12:00:00Z")
    day, rest = text[:10], text[11:].split(" ")
    try:
        return datetime.fromisoformat(f"{day}T{''.join(rest[:2])}").astimezone(UTC)
    except ValueError:
        raise Invalid("by_expires_before is not a time", code="invalid_time") from None
