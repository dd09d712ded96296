"""Workloads of other trust domains that may start tasks: nobody, unless an operator names them.

A foreign workload has no registration entry here, no node agent of ours and no session that we would hear of. Who it is was
judged under its own trust domain's bundle; what it may do is this list, and the policy after it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from broker.errors import BrokerError, Misconfigured
from broker.registry.entry import SERVER_PATH, Entry
from broker.spiffe import Selector, SpiffeId, TrustDomain

ENTRY_ID: Final = "foreign"
"""The entry id in records of workloads that have none."""
_BELOW: Final = "/*"
_LONG_AGO: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class IdPattern:
    """One SPIFFE ID, or with a final ``/*`` all below it, at a segment boundary; raises Misconfigured."""

    text: str

    def __post_init__(self) -> None:
        """Check that the part before ``/*`` is a SPIFFE ID; a whole trust domain may be named only so."""
        try:
            found = SpiffeId(self.text.removesuffix(_BELOW))
        except BrokerError as error:
            raise Misconfigured(
                f"{self.text!r} is not a SPIFFE ID: {error.message}",
                code="foreign_starters",
                hint="write spiffe://partner.example/agents/bot, or spiffe://partner.example/agents/*",
            ) from None
        if not found.path and not self.text.endswith(_BELOW):
            raise Misconfigured(
                f"{self.text} names a trust domain, no workload",
                code="foreign_starters",
                hint=f"all of its workloads are {self.text}/*",
            )

    @property
    def trust_domain(self) -> TrustDomain:
        """The trust domain of all that it names."""
        return SpiffeId(self.text.removesuffix(_BELOW)).trust_domain

    def matches(self, spiffe_id: SpiffeId) -> bool:
        """Tell whether it names this ID: /agent/* names /agent/x, and neither /agent nor /agent-evil (SP11)."""
        if self.text.endswith(_BELOW):
            return str(spiffe_id).startswith(self.text[:-1])
        return str(spiffe_id) == self.text


class ForeignStarters:
    """Which workloads of other trust domains may start tasks and have tokens."""

    def __init__(self, patterns: Iterable[str], own: TrustDomain) -> None:
        """Read the patterns; raises Misconfigured for one of our own trust domain: its workloads have entries."""
        self._own = own
        self._patterns = tuple(IdPattern(text) for text in patterns)
        for pattern in self._patterns:
            if pattern.trust_domain == own:
                raise Misconfigured(
                    f"{pattern.text} is of this server's own trust domain",
                    code="foreign_starters",
                    hint="register an entry with may_start_tasks instead",
                )

    def is_foreign(self, spiffe_id: SpiffeId) -> bool:
        """Tell whether an ID is of another trust domain than ours."""
        return spiffe_id.trust_domain != self._own

    def permits(self, spiffe_id: SpiffeId) -> bool:
        """Tell whether a workload of another trust domain is named."""
        # NOTE(security): what lies under /spire are servers and node agents, there as here: never a workload.
        if not self.is_foreign(spiffe_id) or spiffe_id.path == "/spire" or spiffe_id.path.startswith("/spire/"):
            return False
        return any(pattern.matches(spiffe_id) for pattern in self._patterns)

    def entry_of(self, spiffe_id: SpiffeId) -> Entry | None:
        """Give what stands for the registration entry of a foreign workload that is named; None for any other."""
        if not self.permits(spiffe_id):
            return None
        return Entry(
            id=ENTRY_ID,
            spiffe_id=spiffe_id,
            parent_id=SpiffeId.of(spiffe_id.trust_domain, SERVER_PATH),
            selectors=frozenset({Selector(f"spiffe_id:{spiffe_id}")}),
            created_at=_LONG_AGO,
            may_start_tasks=True,
        )
