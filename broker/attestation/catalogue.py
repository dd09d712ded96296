"""Finds attestors by entry points: built-in and foreign ones through the same door.

Only names written in the settings are loaded, and only from trusted distributions. A name that nobody offers, or that
two distributions offer, stops the start. An optional attestor that cannot be loaded is kept with its reason. Knows no
attestor by name, except that ``join_token`` cannot be replaced.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, cast

from pydantic import ValidationError

from broker.attestation.contract import (
    NODE_AGENT_GROUP,
    NODE_SERVER_GROUP,
    WORKLOAD_GROUP,
    NodeAgentAttestor,
    NodeServerAttestor,
    WorkloadAttestor,
)
from broker.errors import Misconfigured

OUR_DISTRIBUTION = "identity-broker"
IRREPLACEABLE = frozenset({"join_token"})  # a foreign one could read every node's admission secret


@dataclass(frozen=True, slots=True)
class Offer:
    """One attestor class that an installed distribution offers under a name."""

    name: str
    distribution: str
    load: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class UnavailableAttestor:
    """An optional attestor that could not be loaded, and why. It describes nobody."""

    name: str
    reason: str


Offers = Callable[[str], Iterable[Offer]]
Table = Mapping[str, Any]


def installed(group: str) -> tuple[Offer, ...]:
    """List what the installed distributions offer in an entry-point group."""
    return tuple(
        Offer(point.name, point.dist.name if point.dist else "", point.load) for point in entry_points(group=group)
    )


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Turns names and tables of the settings into attestors. Every method raises ``Misconfigured``."""

    trusted_distributions: frozenset[str] = frozenset({OUR_DISTRIBUTION})
    offers: Offers = installed

    def workload(
        self, tables: Mapping[str, Table]
    ) -> tuple[tuple[WorkloadAttestor, ...], tuple[UnavailableAttestor, ...]]:
        """Make every configured workload attestor; those that cannot be loaded come back with their reason."""
        ready: list[WorkloadAttestor] = []
        broken: list[UnavailableAttestor] = []
        for name, table in tables.items():
            offer = self._offer(WORKLOAD_GROUP, name)
            try:
                attestor_class = offer.load()
            except (ImportError, AttributeError) as error:
                broken.append(UnavailableAttestor(name, f"{type(error).__name__}: {error}"))
                continue
            ready.append(cast("WorkloadAttestor", _made(WORKLOAD_GROUP, name, attestor_class, table)))
        if not ready:
            raise Misconfigured("no workload attestor is available", hint="add [agent.attestors.workload.unix]")
        return tuple(ready), tuple(broken)

    def node_agent(self, name: str, table: Table) -> NodeAgentAttestor:
        """Make the agent's half of the one node attestor."""
        return cast("NodeAgentAttestor", self._required(NODE_AGENT_GROUP, name, table))

    def node_server(self, name: str, table: Table) -> NodeServerAttestor:
        """Make the server's half of a node attestor."""
        return cast("NodeServerAttestor", self._required(NODE_SERVER_GROUP, name, table))

    def _required(self, group: str, name: str, table: Table) -> object:
        offer = self._offer(group, name)
        try:
            attestor_class = offer.load()
        except (ImportError, AttributeError) as error:
            raise Misconfigured(f"the attestor {name!r} cannot be loaded: {error}") from error
        return _made(group, name, attestor_class, table)

    def _offer(self, group: str, name: str) -> Offer:
        named = [offer for offer in self.offers(group) if offer.name == name]
        if name in IRREPLACEABLE:
            named = [offer for offer in named if _canonical(offer.distribution) == OUR_DISTRIBUTION]
        if not named:
            raise Misconfigured(f"no installed distribution offers an attestor {name!r}", code="attestor_unknown")
        if len({_canonical(offer.distribution) for offer in named}) > 1 or len(named) > 1:
            raise Misconfigured(f"more than one distribution offers an attestor {name!r}", code="attestor_ambiguous")
        (offer,) = named
        if _canonical(offer.distribution) not in {_canonical(trusted) for trusted in self.trusted_distributions}:
            raise Misconfigured(
                f"the attestor {name!r} comes from {offer.distribution!r}, which is not trusted",
                code="attestor_untrusted",
                hint="add the distribution to trusted_distributions if you do trust it",
            )
        return offer


def _made(group: str, name: str, attestor_class: Any, table: Table) -> object:
    if attestor_class.name != name:
        raise Misconfigured(f"the attestor offered as {name!r} calls itself {attestor_class.name!r}")
    try:
        settings = attestor_class.settings.model_validate(dict(table))
    except ValidationError as error:
        # Only place and kind: a value may be a secret.
        problems = "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_input=False)
        )
        raise Misconfigured(f"settings of the attestor {name!r} ({group}): {problems}") from None
    return attestor_class(settings)


def _canonical(distribution: str) -> str:
    return distribution.lower().replace("_", "-").replace(".", "-")
