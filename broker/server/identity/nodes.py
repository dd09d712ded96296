"""Node agents: the pinned serial number, ban and eviction.

An agent is trusted less than the server: each of its calls is judged against its node here. Of its certificates exactly
one counts; a renewed one takes over at its first use. How a node is admitted is ``admission``'s business.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import Final

from broker.audit.events import Event
from broker.audit.records import Record
from broker.clock import Clock
from broker.errors import BrokerError, Invalid, NotFound, Refused
from broker.server.identity.changes import GONE, NODE_KIND, node_text
from broker.server.identity.directory import Directory
from broker.server.identity.entries import PRUNER, remove_entry
from broker.server.identity.filters import NodeFilter, Page, node_order, page
from broker.server.identity.withdrawals import NOTHING, Withdrawals
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import Node
from broker.spiffe import Selector, SpiffeId, X509Svid
from broker.telemetry.log import get_logger

AGENT_PATH: Final = "/spire/agent"
MAX_VERSION: Final = 255
"""Longest agent version, as in SPIRE."""
JOIN_TOKEN: Final = "join_token"  # noqa: S105 - an attestor's name
ALIAS_SELECTOR: Final = "spiffe_id"
"""The selector type of the entry that gives a node an extra identity, as in SPIRE."""

log = get_logger("nodes")


class AgentRefused(Refused):
    """An agent whose certificate does not count (any more); the code is SPIRE's reason in lower case."""

    code = "agent_not_attested"


class Nodes:
    """The use cases of node agents."""

    def __init__(
        self,
        store: Store,
        directory: Directory,
        clock: Clock,
        withdrawals: Withdrawals = NOTHING,
    ) -> None:
        self._store = store
        self._withdrawals = withdrawals
        self._directory = directory
        self._clock = clock
        self._activated: dict[SpiffeId, str] = {}
        self._activations: asyncio.Queue[tuple[SpiffeId, str]] = asyncio.Queue()

    # ---- judging a caller

    def require_active(self, svid: X509Svid) -> Node:
        """Give the node of a calling agent; raises AgentRefused, the code saying whether to attest anew.

        The first call with a renewed certificate ends the one before it, at once here and a moment later in the store.
        """
        if svid.not_after <= self._clock.now():
            raise AgentRefused(f'agent "{svid.id}" SVID is expired', code="agent_expired")
        node = self._directory.node(svid.id)
        if node is None:
            raise AgentRefused(
                f'agent "{svid.id}" is not attested', code="agent_not_attested", hint="attest the node again"
            )
        if node.banned:
            raise AgentRefused(f'agent "{svid.id}" is banned', code="agent_banned")
        serial = str(svid.serial)
        if serial == self._activated.get(svid.id, node.serial):
            return node
        if serial == node.new_serial and serial:
            self._activated[svid.id] = serial
            self._activations.put_nowait((svid.id, serial))
            return node
        raise AgentRefused(
            f'agent "{svid.id}" expected to have serial number "{node.serial}"; has "{serial}"',
            code="agent_not_active",
            hint="attest the node again",
        )

    def forget_activation(self, agent_id: SpiffeId) -> None:
        """Drop the note that a renewed certificate was used: the node itself has changed since."""
        self._activated.pop(agent_id, None)

    async def run(self) -> None:
        """Write down which renewed certificates have been used, until cancelled."""
        while True:
            agent_id, serial = await self._activations.get()
            try:
                await self._activate(agent_id, serial)
            except BrokerError as error:
                log.warning("agent_activation_failed", agent=str(agent_id), code=error.reason)
                await asyncio.sleep(1)
                self._activations.put_nowait((agent_id, serial))

    async def _activate(self, agent_id: SpiffeId, serial: str) -> None:
        def act(writer: Writer) -> None:
            node = writer.node(agent_id)
            if node is not None and node.new_serial == serial:
                put_node(writer, replace(node, serial=serial, new_serial=""))

        await self._store.write(act)
        if self._activated.get(agent_id) == serial:
            del self._activated[agent_id]

    async def report(self, svid: X509Svid, version: str) -> None:
        """Note the version that an agent says it has; raises Invalid."""
        if len(version.encode()) > MAX_VERSION or not version.isprintable():
            raise Invalid("agent version is too long (max 255 characters), or not printable", code="invalid_version")
        if self.require_active(svid).agent_version == version:
            return

        def act(writer: Writer) -> None:
            current = writer.node(svid.id)
            if current is not None:
                put_node(writer, replace(current, agent_version=version))

        await self._store.write(act)

    # ---- administration

    def get(self, agent_id: SpiffeId) -> Node:
        """Give one node; raises NotFound."""
        node = self._directory.node(agent_id)
        if node is None:
            raise _not_found()
        return node

    def find(self, wanted: NodeFilter, size: int = 0, token: str = "") -> Page[Node]:
        """Give a page of nodes by SPIFFE ID."""
        return page((node for node in self._directory.nodes() if wanted.holds(node)), node_order, size, token)

    def count(self, wanted: NodeFilter) -> int:
        """Count nodes."""
        return sum(1 for node in self._directory.nodes() if wanted.holds(node))

    async def ban(self, agent_id: SpiffeId, actor: str) -> None:
        """Refuse an agent from now on; it cannot attest again until it is deleted. Raises NotFound."""
        now = self._clock.now()

        def act(writer: Writer) -> None:
            node = writer.node(agent_id)
            if node is None:
                raise _not_found()
            put_node(writer, replace(node, banned=True, serial="", new_serial=""))
            writer.record(Record(Event.AGENT_BANNED, now, actor, str(agent_id), {}))
            self._withdrawals.node_gone(writer, agent_id, actor, now)

        await self._store.write(act)
        self._activated.pop(agent_id, None)

    async def delete(self, agent_id: SpiffeId, actor: str) -> None:
        """Forget an agent; it may attest again. Raises NotFound."""
        now = self._clock.now()
        below = self._directory.children(agent_id)

        def act(writer: Writer) -> None:
            node = writer.remove_node(agent_id)
            if node is None:
                raise _not_found()
            self._forget(writer, node, below, Record(Event.AGENT_EVICTED, now, actor, str(agent_id), {}))

        await self._store.write(act)
        self._activated.pop(agent_id, None)

    async def prune(self, expired_before: datetime, limit: int, *, include_non_reattestable: bool) -> int:
        """Forget nodes whose SVID expired before a time, at most ``limit``; gives how many went. Banned ones stay.

        Judged again in the transaction: a node that attested a moment ago stays.
        """

        def is_over(node: Node) -> bool:
            return (
                not node.banned and node.expires_at < expired_before and (node.reattestable or include_non_reattestable)
            )

        over = list(islice((node.id for node in self._directory.nodes() if is_over(node)), limit))
        if not over:
            return 0
        now = self._clock.now()
        below = {agent_id: self._directory.children(agent_id) for agent_id in over}

        def act(writer: Writer) -> list[SpiffeId]:
            found = [node for agent_id in over if (node := writer.node(agent_id)) is not None and is_over(node)]
            for node in found:
                writer.remove_node(node.id)
                self._forget(writer, node, below[node.id], Record(Event.AGENT_PURGED, now, PRUNER, str(node.id), {}))
            return [node.id for node in found]

        gone = await self._store.write(act)
        for agent_id in gone:
            self._activated.pop(agent_id, None)
        return len(gone)

    def _forget(self, writer: Writer, node: Node, below: Iterable[str], record: Record) -> None:
        writer.change(NODE_KIND, str(node.id), GONE)
        writer.record(record)
        self._withdrawals.node_gone(writer, node.id, record.actor, record.at)
        if node.attestation_type != JOIN_TOKEN:
            return
        # The alias that came with its join token names this node alone, and another token makes another.
        alone = frozenset({Selector.of(ALIAS_SELECTOR, str(node.id))})
        for entry_id in below:
            entry = writer.entry(entry_id)
            if entry is not None and entry.parent_id == node.id and entry.selectors == alone:
                remove_entry(writer, entry_id, record.actor, record.at, self._withdrawals)


def put_node(writer: Writer, node: Node) -> None:
    """Write one node with its change row; part of a larger act."""
    writer.put_node(node)
    writer.change(NODE_KIND, str(node.id), node_text(node))


def _not_found() -> NotFound:
    return NotFound("agent not found", code="agent_not_found")
