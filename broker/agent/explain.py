"""Why a process has an identity or none: what the attestors said, and what the entries of this agent still lack.

Decides nothing: it asks the attestors as a caller's attestation does, and shows the cache's own decision. Meant for the
node's operator; a caller is told nothing of it.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from os import sysconf
from typing import Final

from broker.agent.answers import Answer, combined
from broker.agent.cache import EstateCache
from broker.agent.entitlement import NOT_SYNCED
from broker.agent.sessions import WorkloadSession
from broker.agent.workloads import NO_IDENTITY, Caller, Workloads, outward
from broker.attestation.kernel import boot_time
from broker.attestation.process import Facts, Process
from broker.attestation.strength import Strengths
from broker.clock import Clock
from broker.errors import BrokerError, NoIdentity, NotAttested, NotFound, Unavailable
from broker.registry import Decision, Entry
from broker.registry.explain import Finding, findings, most_likely
from broker.spiffe import Selector
from broker.transport.grpc_status import status_code

MAX_SHOWN: Final = 128  # selectors of one attestor: a user may be in thousands of groups
ASKED_FOR_ANOTHER: Final = "it has these identities now: it asked for another one, or they came afterwards"
UNKNOWN: Final = "unknown"  # strength of a selector that no attestor in use gives


@dataclass(frozen=True, slots=True)
class ProcessShown:
    """A process as it is shown. The executable's name is the kernel's text and proves nothing."""

    pid: int
    uid: int
    gid: int
    executable: str
    started_at: datetime | None
    is_held: bool  # whether we hold a handle on it now


@dataclass(frozen=True, slots=True)
class AttestorShown:
    """One attestor's answer: ``state`` is ok, fail or not-mine."""

    name: str
    state: str
    code: str
    selectors: tuple[str, ...] = ()
    reason: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The whole answer. ``strengths``: who vouches for each selector that is shown; ``considered``: of all entries."""

    process: ProcessShown | None = None
    attestors: tuple[AttestorShown, ...] = ()
    selectors: tuple[str, ...] = ()
    entries: tuple[Finding, ...] = ()
    considered: int = 0
    is_matched: bool = False  # whether entries were looked at
    strengths: tuple[tuple[str, str], ...] = ()
    code: str = ""
    message: str = ""
    status: str = ""
    most_likely: str = ""


class Explainer:
    """Explains processes, sets of selectors, entries and refusals."""

    def __init__(
        self,
        workloads: Workloads,
        cache: EstateCache,
        strengths: Strengths,
        clock: Clock,
        show: Callable[[Selector], str],
    ) -> None:
        """``show`` gives a selector's text without its secrets."""
        self._workloads = workloads
        self._cache = cache
        self._strengths = strengths
        self._clock = clock
        self._show = show

    @property
    def entries(self) -> int:
        """How many entries a question looks at."""
        return len(self._cache)

    async def process(self, pid: int, entry_id: str = "") -> Explanation:
        """Explain what a process would get if it asked now; raises NotFound where there is none."""
        try:
            process = Process.of_pid(pid)
        except NotAttested as error:
            if error.reason == "process_gone":
                raise NotFound(
                    f"there is no process {pid}", code="process_not_found", hint="ps -e lists them"
                ) from None
            return _concluded(Explanation(most_likely=error.hint or error.message), outward(error), cause=error)
        try:
            executable = ""
            with suppress(NotAttested):
                executable = process.link("exe")
            answers = await self._workloads.describe(process)
            shown = shown_process(process, executable, is_held=True)
            refusal: BrokerError | None = None
            try:
                combined(answers)
                process.still_same()
            except BrokerError as error:
                refusal = error
        finally:
            process.close()
        return self.answered(shown, answers, refusal, entry_id)

    def selectors(self, selectors: Iterable[Selector], entry_id: str = "") -> Explanation:
        """Explain what a process with exactly these selectors would get."""
        held = frozenset(selectors)
        return self._matched(Explanation(), held, None, entry_id)

    def entry(self, entry_id: str) -> Explanation:
        """Explain what an entry asks for, and whether a process that has it all would get it; raises NotFound."""
        return self.selectors(self._known(entry_id), entry_id)

    def answered(
        self, shown: ProcessShown, answers: Sequence[Answer], refusal: BrokerError | None, entry_id: str = ""
    ) -> Explanation:
        """Explain a process by what its attestors said; ``refusal`` is what stands against it whatever the entries say."""
        held = frozenset[Selector]().union(*(answer.selectors for answer in answers))
        rows = tuple(self._attestor(answer) for answer in answers)
        return self._matched(Explanation(process=shown, attestors=rows), held, refusal, entry_id)

    def refusal(self, caller: Caller | None, error: BrokerError, *, with_entries: bool) -> Explanation:
        """Explain a refusal that was just given. Without its entries it costs little: :meth:`completed` adds them."""
        cause = _cause(error)
        if caller is None:
            return _concluded(Explanation(most_likely=cause.hint), error, cause=cause)
        # NOTE(security): the process's descriptors may be closed by now: only what was read before is shown.
        shown = shown_process(caller.process, caller.executable, is_held=False)
        answers = caller.session.answers if caller.session is not None else caller.answers
        rows = tuple(self._attestor(answer) for answer in answers)
        explained = Explanation(process=shown, attestors=rows)
        if isinstance(cause, NoIdentity) and with_entries:
            explained = self._with_entries(explained, held_by(caller) or frozenset())
        return _concluded(self._advised(explained, cause), error, cause=cause)

    def completed(self, explained: Explanation, held: frozenset[Selector]) -> Explanation:
        """Add the entries as they are now to the explanation of a refusal."""
        return self._advised(replace(self._with_entries(explained, held), most_likely=""), NoIdentity(NO_IDENTITY))

    def shown(self, selectors: frozenset[Selector]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Show selectors, and who vouches for each."""
        chosen = sorted(selectors)[:MAX_SHOWN]
        return tuple(map(self._show, chosen)), {self._show(one): self._strength(one) for one in chosen}

    def live(self, session: WorkloadSession) -> ProcessShown:
        """Show the process of a session that has not ended."""
        executable = ""
        with suppress(NotAttested):
            executable = session.process.link("exe")
        return shown_process(session.process, executable, is_held=True)

    # ---- parts

    def _matched(
        self, explained: Explanation, held: frozenset[Selector], refusal: BrokerError | None, entry_id: str
    ) -> Explanation:
        if entry_id:
            self._known(entry_id)
        explained = self._with_entries(explained, held, entry_id)
        error: BrokerError | None = refusal
        if error is None and not self._cache.is_synced:
            error = Unavailable(NOT_SYNCED, code="not_synced", hint="broker agent health; its log says why")
        elif error is None and not any(one.is_issued for one in explained.entries):
            error = NoIdentity(NO_IDENTITY)
        explained = self._advised(explained, error)
        if error is None:
            count = sum(one.is_issued for one in explained.entries)
            return replace(
                explained, code="issued", status="OK", message=f"{count} identities" if count > 1 else "1 identity"
            )
        told = outward(error) if isinstance(error, NotAttested) else error
        return _concluded(explained, told, cause=error)

    def _with_entries(self, explained: Explanation, held: frozenset[Selector], entry_id: str = "") -> Explanation:
        decision = self._cache.explain(held, self._clock.now())
        # Entries that name nodes lack everything that a process has: they are shown when they are asked for.
        decision = _only(decision, lambda entry: entry.id == entry_id if entry_id else not entry.is_alias)
        failed = {row.name for row in explained.attestors if row.state == "fail"}
        found = tuple(self._noted(one, failed) for one in findings(decision, show=self._show))
        selectors, strengths = self.shown(held)
        # What is hidden stands behind the form, and the form says who vouches for it.
        strengths |= {text: self._strength(Selector(text)) for one in found for text in one.lacks}
        return replace(
            explained,
            selectors=selectors,
            entries=found,
            considered=len(decision.considered),
            is_matched=True,
            strengths=tuple(sorted(strengths.items())),
        )

    def _noted(self, one: Finding, failed: set[str]) -> Finding:
        kinds = {text.partition(":")[0] for text in one.lacks}
        notes = [f"the attestor {name} failed" for name in sorted(kinds & failed)]
        notes += [
            f"no attestor of this agent gives {text}"
            for text in one.lacks
            if self._strengths.of(Selector(text)) is None
        ]
        return replace(one, note="; ".join(filter(None, (one.note, *notes))))

    def _attestor(self, answer: Answer) -> AttestorShown:
        error = answer.error
        if error is not None:
            return AttestorShown(answer.attestor, "fail", error.reason, (), error.message, error.hint)
        if not answer.selectors:
            return AttestorShown(answer.attestor, "not-mine", "not_mine")
        shown = tuple(self._show(one) for one in sorted(answer.selectors)[:MAX_SHOWN])
        more = len(answer.selectors) - len(shown)
        return AttestorShown(answer.attestor, "ok", "attested", shown, f"and {more} more" if more else "")

    def _advised(self, explained: Explanation, cause: BrokerError | None) -> Explanation:
        if explained.most_likely:
            return explained
        failed = [row for row in explained.attestors if row.state == "fail"]
        if failed:
            advice = f"the attestor {failed[0].name} failed: {failed[0].reason}"
            return replace(explained, most_likely=f"{advice}; {failed[0].hint}" if failed[0].hint else advice)
        if cause is not None and not isinstance(cause, NoIdentity):
            return replace(explained, most_likely=cause.hint or cause.message)
        if cause is not None and any(one.is_issued for one in explained.entries):
            return replace(explained, most_likely=ASKED_FOR_ANOTHER)
        return replace(explained, most_likely=most_likely(explained.entries) if explained.is_matched else "")

    def _strength(self, selector: Selector) -> str:
        found = self._strengths.of(selector)
        return UNKNOWN if found is None else str(found)

    def _known(self, entry_id: str) -> frozenset[Selector]:
        entry = self._cache.entry(entry_id)
        if entry is None:
            raise NotFound(
                f"this agent has no entry {entry_id}",
                code="entry_not_known",
                hint="broker entry show says whose child it is; an agent is told of its own entries only",
            )
        return entry.selectors


def held_by(caller: Caller) -> frozenset[Selector] | None:
    """Give the selectors of an attested caller; None: it was not attested."""
    return caller.session.selectors if caller.session is not None else None


def shown_process(process: Process, executable: str, *, is_held: bool) -> ProcessShown:
    """Show a process by the facts that were read when it was opened."""
    return ProcessShown(process.pid, process.uid, process.gid, executable, _started_at(process.facts), is_held)


def _started_at(facts: Facts) -> datetime | None:
    try:
        seconds = boot_time() + facts.start_time / sysconf("SC_CLK_TCK")
        return datetime.fromtimestamp(0, UTC) + timedelta(seconds=int(seconds))
    except (OSError, ValueError, OverflowError):
        return None


def _only(decision: Decision, wanted: Callable[[Entry], bool]) -> Decision:
    return Decision(
        decision.selectors,
        tuple(entry for entry in decision.issued if wanted(entry)),
        tuple(each for each in decision.considered if wanted(each.entry)),
    )


def _cause(error: BrokerError) -> BrokerError:
    """Give the reason that a caller was not told, where there is one."""
    return error.__cause__ if isinstance(error.__cause__, BrokerError) else error


def _concluded(explained: Explanation, told: BrokerError, *, cause: BrokerError) -> Explanation:
    message = told.message if cause is told or cause.message == told.message else f"{told.message}: {cause.message}"
    return replace(explained, code=cause.reason, message=message, status=status_code(told).name)
