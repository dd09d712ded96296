"""The contract between the broker and its attestors, both kinds.

A workload attestor describes one process by selectors. A node attestor has two halves: the agent's, which gives
evidence, and the server's, which judges it. They are found by entry points (``catalogue``). Nothing here knows entries,
stores or the wire.

A workload attestor answers ``frozenset()`` for "not mine"; it raises :class:`AttestorFailed` for "mine, and I could not
tell", which refuses the caller: fewer selectors than the truth could match another entry than intended. It is asked again
while a session lives: what a label or a runtime says may change.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel

from broker.attestation.process import Process
from broker.errors import NotAttested
from broker.spiffe import Bundle, Selector, TrustDomain

WORKLOAD_GROUP = "broker.attestors.workload"
NODE_AGENT_GROUP = "broker.attestors.node.agent"
NODE_SERVER_GROUP = "broker.attestors.node.server"


class AttestorFailed(NotAttested):
    """The process or node is this attestor's to describe, and it could not."""

    code = "attestor_failed"


class AttestorUnavailable(AttestorFailed):
    """Whoever must be asked did not answer: nothing was learnt, for the process or against it.

    At the first attestation the same as any failure. Of a process that was attested before, the last answer holds for a
    while, so that a runtime that is restarted does not end every session on the node.
    """


class Strength(StrEnum):
    """Who stands behind a selector."""

    KERNEL = "kernel"
    RUNTIME = "runtime"
    SELF_DECLARED = "self-declared"


@dataclass(frozen=True, slots=True)
class SelectorDoc:
    """One kind of selector that an attestor gives: its form, what it means, and who vouches for it."""

    form: str  # e.g. "unix:uid:<number>"
    meaning: str
    strength: Strength


class WorkloadAttestor(Protocol):
    """Describes one process. Made as ``Attestor(settings)`` with an instance of its own settings model."""

    name: ClassVar[str]
    settings: ClassVar[type[BaseModel]]

    @property
    def selectors(self) -> tuple[SelectorDoc, ...]:
        """What it gives under its settings, which may decide who stands behind it; a class attribute will do."""
        ...

    async def attest(self, process: Process) -> frozenset[Selector]:
        """Give every selector that holds for the process; raises ``AttestorFailed`` when that cannot be told.

        Raises ``AttestorUnavailable`` where that is only because somebody else did not answer.
        """
        ...


@dataclass(frozen=True, slots=True, repr=False)
class Evidence:
    """What a node sends to prove itself: the attestor's name and bytes in that attestor's own format."""

    type: str
    payload: bytes

    def __repr__(self) -> str:
        return f"Evidence(type={self.type!r}, payload=<secret>)"


@dataclass(frozen=True, slots=True, repr=False)
class AttestedNode:
    """The server half's verdict.

    ``path`` is the agent's SPIFFE path below ``/spire/agent``. ``consumes`` is a one-time secret that the server must
    use up in the same transaction that admits the node; the verdict stands only if that succeeds.
    """

    path: str
    selectors: frozenset[Selector]
    reattestable: bool
    consumes: str | None = None

    def __repr__(self) -> str:
        return f"AttestedNode(selectors={len(self.selectors)}, reattestable={self.reattestable})"


class NodeAgentAttestor(Protocol):
    """The agent's half. Made as ``Attestor(settings)``."""

    name: ClassVar[str]
    settings: ClassVar[type[BaseModel]]

    async def evidence(self) -> Evidence:
        """Give fresh evidence; raises ``AttestorFailed`` when there is none."""
        ...

    async def respond(self, challenge: bytes) -> bytes:
        """Answer the server's challenge; raises ``AttestorFailed``."""
        ...


ChallengeWith = Callable[[bytes], Awaitable[bytes]]


class NodeServerAttestor(Protocol):
    """The server's half. Made as ``Attestor(settings)``."""

    name: ClassVar[str]
    settings: ClassVar[type[BaseModel]]

    async def verify(self, evidence: Evidence, challenge_with: ChallengeWith) -> AttestedNode:
        """Judge the evidence, asking the node through ``challenge_with``; raises ``NotAttested``."""
        ...


@dataclass(frozen=True, slots=True)
class Home:
    """What a server's half may know of its server: the trust domain, and the bundle of this moment."""

    trust_domain: TrustDomain
    bundle: Callable[[], Bundle]


@runtime_checkable
class SettledAttestor(Protocol):
    """A server's half that asks to be told of its server, once, before its first node."""

    def settle(self, home: Home) -> None:
        """Take it and keep it."""
        ...
