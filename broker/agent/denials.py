"""The latest refusals at the workload socket, by a short id that the caller is told, so that an operator can ask why.

In memory only, and bounded: by their number, and by their number for one user, so that nobody drives another's refusals out.
The reasons go to the log in the same moment, redacted as for ``broker explain``.
"""

import secrets
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from broker.agent.explain import Explainer, Explanation, held_by
from broker.agent.refusal_log import RefusalLog
from broker.agent.workloads import Caller
from broker.clock import Clock
from broker.errors import BrokerError, NoIdentity, NotFound
from broker.registry.explain import Finding
from broker.spiffe import Selector

MAX_DENIALS: Final = 512  # some 10 KiB each at the most
MAX_OF_ONE_USER: Final = 128
MAX_KEPT_SELECTORS: Final = 256  # of a refusal whose entries are looked at only when somebody asks
MAX_ENTRIES_AT_ONCE: Final = 2000  # entries looked at while callers wait: some 10 ms; above that when somebody asks
MAX_LOGGED: Final = 3  # nearest entries in a line of the log
ID_BYTES: Final = 4
NO_USER: Final = -1  # refused before we knew whose connection it was


@dataclass(frozen=True, slots=True)
class Denial:
    """One refusal. ``is_late``: the entries are those of the moment of the question, not of the refusal."""

    id: str
    at: datetime
    method: str
    explanation: Explanation
    selectors: frozenset[Selector] | None = None
    is_late: bool = False


class Denials:
    """Records refusals, logs them, finds them again."""

    def __init__(
        self, explainer: Explainer, log: RefusalLog, clock: Clock, on_refused: Callable[[str, int], None]
    ) -> None:
        """``on_refused`` is called with the code and the user of each."""
        self._explainer = explainer
        self._log = log
        self._clock = clock
        self._on_refused = on_refused
        self._kept: OrderedDict[str, tuple[int, Denial]] = OrderedDict()
        self._by_user: dict[int, deque[str]] = {}

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def record(self, method: str, caller: Caller | None, error: BrokerError) -> str:
        """Keep and log a refusal that is about to be told; give its id."""
        # Reasons cost a look at every entry: in a storm they are found when somebody asks.
        now = self._log.has_room() and self._explainer.entries <= MAX_ENTRIES_AT_ONCE
        explained = self._explainer.refusal(caller, error, with_entries=now)
        held = held_by(caller) if caller is not None and isinstance(error, NoIdentity) and not now else None
        if held is not None and len(held) > MAX_KEPT_SELECTORS:
            held = None
        denial = Denial(secrets.token_hex(ID_BYTES), self._clock.now(), method, explained, held)
        process = explained.process
        uid = NO_USER if process is None else process.uid
        self._keep(denial, uid)
        self._on_refused(explained.code, uid)
        self._log(
            "refused",
            denial=denial.id,
            method=method,
            pid=process.pid if process is not None else None,
            uid=process.uid if process is not None else None,
            code=explained.code,
            reason=explained.message,
            hint=explained.most_likely,
            nearest=[_short(one) for one in explained.entries[:MAX_LOGGED]],
        )
        return denial.id

    def count(self, error: BrokerError, uid: int) -> None:
        """Count a refusal of a connection: nobody is told an id of it, so nobody will ask."""
        self._on_refused(error.reason, uid)

    def find(self, denial_id: str) -> Denial:
        """Give a refusal; raises NotFound where it is not known, or no longer."""
        found = self._kept.get(denial_id)
        if found is None:
            raise NotFound(
                f"this agent knows no refusal {denial_id!r}",
                code="denial_not_known",
                hint=f"the latest {MAX_DENIALS} are kept until the agent ends; its log has more",
            )
        denial = found[1]
        if denial.selectors is None:
            return denial
        return replace(
            denial, explanation=self._explainer.completed(denial.explanation, denial.selectors), is_late=True
        )

    def _keep(self, denial: Denial, uid: int) -> None:
        mine = self._by_user.setdefault(uid, deque())
        if len(mine) >= MAX_OF_ONE_USER:
            self._drop(mine[0])
        elif len(self._kept) >= MAX_DENIALS:
            self._drop(next(iter(self._kept)))
        self._kept[denial.id] = (uid, denial)
        self._by_user.setdefault(uid, mine).append(denial.id)

    def _drop(self, denial_id: str) -> None:
        uid, _ = self._kept.pop(denial_id)
        # Both are in the order of their coming: what is the oldest of all is the oldest of its user.
        self._by_user[uid].popleft()
        if not self._by_user[uid]:
            del self._by_user[uid]


def _short(one: Finding) -> str:
    return f"{one.entry_id} {one.code}" + (f" lacks {' '.join(one.lacks)}" if one.lacks else "")
