"""Forgetting nodes that will not come back, by SPIRE's settings. Off until a time is set."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from broker.clock import Clock
from broker.errors import BrokerError
from broker.server.identity.nodes import Nodes
from broker.telemetry.log import get_logger

LOOK_EVERY: Final = 60.0
"""Seconds between two looks, which ask memory alone; nobody waits for a node to be forgotten."""

log = get_logger("nodes")


@dataclass(frozen=True, slots=True)
class PruningRules:
    """Which nodes go: expired for longer than ``expired_for`` (None: none), ``batch`` of them at a time."""

    expired_for: timedelta | None
    batch: int
    include_non_reattestable: bool


class NodePruning:
    """Looks after nodes that have expired."""

    def __init__(self, nodes: Nodes, clock: Clock, rules: PruningRules) -> None:
        self._nodes = nodes
        self._clock = clock
        self._rules = rules

    async def prune(self) -> int:
        """Forget one batch; gives how many went."""
        if self._rules.expired_for is None:
            return 0
        return await self._nodes.prune(
            self._clock.now() - self._rules.expired_for,
            self._rules.batch,
            include_non_reattestable=self._rules.include_non_reattestable,
        )

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            try:
                pruned = await self.prune()
            except BrokerError as error:
                log.warning("nodes_not_pruned", code=error.reason, error=error.message)
                pruned = 0
            if pruned:
                log.info("nodes_pruned", count=pruned)
            if pruned < self._rules.batch:
                await asyncio.sleep(LOOK_EVERY)
