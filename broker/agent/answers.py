"""What each attestor said of one process, kept apart, and what follows from all of it together.

One rule for callers and for explanations: who is refused here is refused everywhere. Knows no sessions and no entries.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from broker.attestation.contract import AttestorFailed, AttestorUnavailable, WorkloadAttestor
from broker.attestation.process import Process
from broker.errors import BrokerError
from broker.spiffe import Selector
from broker.telemetry.log import get_logger

_log = get_logger("agent.attestors")


@dataclass(frozen=True, slots=True)
class Answer:
    """One attestor's answer: selectors, none ("not mine"), or the error that refuses the process."""

    attestor: str
    selectors: frozenset[Selector] = frozenset()
    error: BrokerError | None = None


async def ask(attestors: Iterable[WorkloadAttestor], process: Process, timeout: float) -> tuple[Answer, ...]:  # noqa: ASYNC109 - of each, all at once
    """Ask every attestor, for ``timeout`` seconds at the most; give their answers in their order."""
    return tuple(await asyncio.gather(*(_ask(one, process, timeout) for one in attestors)))


def combined(answers: Sequence[Answer]) -> frozenset[Selector]:
    """Give all selectors; raises the first attestor's error."""
    for answer in answers:
        if answer.error is not None:
            # NOTE(security): without one attestor's selectors the rest could match a weaker entry than intended.
            raise answer.error
    return frozenset().union(*(answer.selectors for answer in answers))


def asked_again(before: Iterable[Answer], now: Sequence[Answer], *, may_bridge: bool) -> tuple[Answer, ...]:
    """Give the answers that hold for a process that was attested before; raises what ends its attestation.

    ``may_bridge``: of an attestor that could not learn anything now, its last answer holds.
    """
    last = {answer.attestor: answer for answer in before if answer.error is None}
    bridged = tuple(
        last.get(answer.attestor, answer) if may_bridge and isinstance(answer.error, AttestorUnavailable) else answer
        for answer in now
    )
    # What is known to be wrong comes before what is not known.
    errors = [answer.error for answer in bridged if answer.error is not None]
    for error in sorted(errors, key=lambda one: isinstance(one, AttestorUnavailable)):
        raise error
    return bridged


async def _ask(attestor: WorkloadAttestor, process: Process, seconds: float) -> Answer:
    try:
        async with asyncio.timeout(seconds):
            return Answer(attestor.name, await attestor.attest(process))
    except TimeoutError:
        error: BrokerError = AttestorUnavailable("the attestors did not answer in time", code="attestor_timeout")
    except BrokerError as refusal:
        error = refusal
    except Exception as defect:  # noqa: BLE001 - an attestor may be anybody's; its defect refuses the caller
        _log.error("attestor_defect", attestor=attestor.name, exc_info=defect)
        error = AttestorFailed(f"the attestor {attestor.name} failed")
        error.__cause__ = defect
    return Answer(attestor.name, error=error)
