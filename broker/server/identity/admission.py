"""How a node becomes an agent: attestation, and the renewal of what cannot attest again.

The attestor's verdict counts only together with the transaction that admits the node: there the ban, the first use and
the one-time secret are judged. Which attestors there are, and the wire, is not known here.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from broker.attestation.contract import AttestedNode, ChallengeWith, Evidence, NodeServerAttestor
from broker.audit.events import Event
from broker.audit.records import MAX_ITEMS, FieldValue, Record
from broker.clock import Clock
from broker.errors import Invalid, NotAttested, Refused, Unavailable
from broker.registry.entry import Entry
from broker.server.authority import profile
from broker.server.authority.authorities import Authorities
from broker.server.authority.csr import requested_key
from broker.server.authority.profile import Leaf, PublicKey
from broker.server.authority.x509 import X509Authority
from broker.server.identity.entries import add_entry
from broker.server.identity.join_tokens import handle_of, join_token_hash
from broker.server.identity.nodes import AGENT_PATH, ALIAS_SELECTOR, AgentRefused, Nodes, put_node
from broker.server.identity.refusals import RefusalBudget
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import Node
from broker.spiffe import Selector, SpiffeId, TrustDomain, X509Svid
from broker.telemetry.log import get_logger

ATTESTATION_DEADLINE: Final = 30.0
"""Seconds for a whole attestation with its challenges: a node that answers slower holds a place of another."""
MAX_ATTESTATIONS: Final = 32
"""Attestations at one time; others wait. It is the one door without a certificate."""
MAX_CHALLENGES: Final = 8
"""No attestor needs more than two."""
MAX_PAYLOAD: Final = 64 * 1024
"""Largest evidence or response: certificate chains of a TPM have some 20 KiB."""

UNREADABLE: Final = "failed to parse CSR"
"""What SPIRE calls an agent's request that cannot be read."""

log = get_logger("nodes")


@dataclass(frozen=True, slots=True)
class AgentSvid:
    """A signed agent SVID."""

    spiffe_id: SpiffeId
    chain_der: tuple[bytes, ...]
    expires_at: datetime
    reattestable: bool


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A leaf that is decided and not signed yet."""

    authority: X509Authority
    leaf: Leaf
    key: PublicKey

    @property
    def serial(self) -> str:
        return str(self.leaf.serial)

    @property
    def expires_at(self) -> datetime:
        return self.leaf.validity.not_after


class Admission:
    """The use cases of nodes that come, and come back."""

    def __init__(
        self,
        store: Store,
        nodes: Nodes,
        authorities: Authorities,
        clock: Clock,
        *,
        trust_domain: TrustDomain,
        attestors: Mapping[str, NodeServerAttestor],
        agent_ttl: timedelta,
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._authorities = authorities
        self._clock = clock
        self._trust_domain = trust_domain
        self._attestors = attestors
        self._agent_ttl = agent_ttl
        self._refusals = RefusalBudget(clock)
        self._places = asyncio.Semaphore(MAX_ATTESTATIONS)

    async def attest(self, evidence: Evidence, csr_der: bytes, challenge_with: ChallengeWith) -> AgentSvid:
        """Admit a node and sign its agent's SVID; raises NotAttested, Refused, Invalid or Unavailable."""
        if len(evidence.payload) > MAX_PAYLOAD:
            raise Invalid(f"the evidence is longer than {MAX_PAYLOAD} bytes", code="evidence_size")
        attestor = self._attestors.get(evidence.type)
        if attestor is None:
            raise NotAttested(
                f'error getting node attestor: could not find node attestor type "{evidence.type[:64]}"',
                code="attestor_unknown",
            )
        key = requested_key(csr_der, malformed=UNREADABLE)
        async with self._places:
            try:
                verdict = await self._verdict(attestor, evidence, challenge_with)
                agent_id = self._agent_id(evidence.type, verdict)
                prepared = self._prepare(agent_id, key)
                await self._admit(evidence.type, agent_id, verdict, prepared)
            except Refused as error:
                await self._record_refusal(evidence.type, error)
                raise
        log.info("node_attested", agent=str(agent_id), attestor=evidence.type, serial=f"{prepared.leaf.serial:x}")
        return self._sign(agent_id, prepared, verdict.reattestable)

    async def renew(self, svid: X509Svid, csr_der: bytes | None) -> AgentSvid:
        """Sign a new SVID for an agent that cannot attest again; raises AgentRefused (``agent_must_reattest``)."""
        node = self._nodes.require_active(svid)
        if node.reattestable:
            raise AgentRefused("agent must reattest instead of renew", code="agent_must_reattest")
        if not csr_der:
            raise Invalid("params cannot be nil" if csr_der is None else "missing CSR", code="csr_size")
        prepared = self._prepare(svid.id, requested_key(csr_der, malformed=UNREADABLE))
        now = self._clock.now()

        def act(writer: Writer) -> None:
            current = writer.node(svid.id)
            if current is None or current.banned:
                raise AgentRefused(
                    "the agent is not attested", code="agent_banned" if current else "agent_not_attested"
                )
            # The certificate in use now becomes the pinned one, should its activation not have been written yet.
            put_node(
                writer,
                replace(current, serial=str(svid.serial), new_serial=prepared.serial, expires_at=prepared.expires_at),
            )
            writer.record(_attested(Event.NODE_RENEWED, current.attestation_type, current.selectors, prepared, now))

        await self._store.write(act)
        return self._sign(svid.id, prepared, reattestable=False)

    # ---- parts

    async def _verdict(
        self, attestor: NodeServerAttestor, evidence: Evidence, challenge_with: ChallengeWith
    ) -> AttestedNode:
        asked = 0

        async def challenge(text: bytes) -> bytes:
            nonlocal asked
            asked += 1
            if asked > MAX_CHALLENGES:
                raise NotAttested("the attestor asked too often", code="attestation_failed")
            response = await challenge_with(text)
            if len(response) > MAX_PAYLOAD:
                raise Invalid(f"the response is longer than {MAX_PAYLOAD} bytes", code="evidence_size")
            return response

        try:
            async with asyncio.timeout(ATTESTATION_DEADLINE):
                return await attestor.verify(evidence, challenge)
        except TimeoutError:
            raise NotAttested("the attestation took too long", code="attestation_timeout") from None

    def _agent_id(self, attestor: str, verdict: AttestedNode) -> SpiffeId:
        secret = verdict.consumes
        # NOTE(security): a secret never becomes part of an ID, which is shown everywhere; its hash names it as well.
        segments = [handle_of(secret) if segment == secret else segment for segment in verdict.path.split("/")]
        path = "/" + "/".join(filter(None, segments))
        below = SpiffeId.of(self._trust_domain, f"{AGENT_PATH}/{attestor}")
        agent_id = SpiffeId.of(self._trust_domain, f"{AGENT_PATH}{path}")
        # NOTE(security): an attestor names nodes below its own name only, or it could take over another's.
        if agent_id == below or not agent_id.is_under(below):
            raise NotAttested("the attestor gave a node that is not its own", code="attestation_failed")
        return agent_id

    def _prepare(self, agent_id: SpiffeId, key: PublicKey) -> _Prepared:
        authority = self._authorities.x509()
        validity = authority.validity(self._clock.now(), self._agent_ttl)
        serial = profile.serial_number(secrets.randbits(profile.SERIAL_BITS))
        return _Prepared(authority, Leaf(agent_id, serial, validity), key)

    def _sign(self, agent_id: SpiffeId, prepared: _Prepared, reattestable: bool) -> AgentSvid:
        chain = prepared.authority.issue(prepared.leaf, prepared.key)
        return AgentSvid(agent_id, chain, prepared.expires_at, reattestable)

    async def _admit(self, attestor: str, agent_id: SpiffeId, verdict: AttestedNode, prepared: _Prepared) -> None:
        now = self._clock.now()
        alias_entry_id = secrets.token_hex(16)

        def act(writer: Writer) -> None:
            known = writer.node(agent_id)
            if known is not None and known.banned:
                raise AgentRefused("failed to attest: agent is banned", code="agent_banned")
            if verdict.consumes is not None:
                token = writer.take_join_token(join_token_hash(verdict.consumes), now)
                writer.record(_used(token.token_hash, agent_id, attestor, now))
                if token.agent_id is not None:
                    _add_alias(writer, agent_id, token.agent_id, alias_entry_id, now)
            if known is not None and not (known.reattestable and verdict.reattestable):
                raise AgentRefused("the node has attested before and cannot again", code="agent_attested_before")
            put_node(
                writer,
                Node(
                    agent_id, attestor, prepared.serial, "", prepared.expires_at, verdict.selectors,
                    reattestable=verdict.reattestable, agent_version=known.agent_version if known else "",
                ),
            )  # fmt: skip
            writer.record(_attested(Event.NODE_ATTESTED, attestor, verdict.selectors, prepared, now))

        await self._store.write(act)
        self._nodes.forget_activation(agent_id)

    async def _record_refusal(self, attestor: str, error: Refused) -> None:
        left_out = self._refusals.take()
        log.warning("node_refused", attestor=attestor, code=error.reason)
        if left_out is None:
            return
        fields: dict[str, FieldValue] = {"attestor": attestor, "code": error.reason, "left_out": left_out}
        record = Record(Event.NODE_REFUSED, self._clock.now(), "anonymous", attestor, fields)
        with contextlib.suppress(Unavailable):
            # Refused it is, written down or not.
            await self._store.write(lambda writer: writer.record(record))


def _add_alias(writer: Writer, agent_id: SpiffeId, alias: SpiffeId, entry_id: str, now: datetime) -> None:
    entry = Entry(
        id=entry_id,
        spiffe_id=alias,
        parent_id=agent_id,
        selectors=frozenset({Selector.of(ALIAS_SELECTOR, str(agent_id))}),
        created_at=now.replace(microsecond=0),
    )
    if writer.similar_entry(entry.spiffe_id, entry.parent_id, entry.selectors) is None:
        add_entry(writer, entry, str(agent_id), now)


def _attested(
    event: Event, attestor: str, selectors: frozenset[Selector], prepared: _Prepared, now: datetime
) -> Record:
    agent_id = str(prepared.leaf.spiffe_id)
    fields: dict[str, FieldValue] = {
        "attestor": attestor,
        "selectors": sorted(map(str, selectors))[:MAX_ITEMS],
        "serial": f"{prepared.leaf.serial:x}",
        "expires_at": int(prepared.expires_at.timestamp()),
    }
    return Record(event, now, agent_id, agent_id, fields)


def _used(token_hash: str, agent_id: SpiffeId, attestor: str, now: datetime) -> Record:
    return Record(
        Event.JOIN_TOKEN_USED, now, str(agent_id), token_hash, {"token_hash": token_hash, "attestor": attestor}
    )
