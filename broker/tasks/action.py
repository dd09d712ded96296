"""An action that a service does once for a task: claimed before it is done, settled afterwards.

Responsible for what a claim or a settlement becomes of what is known of its step; stores nothing, asks no clock. A *step* is the
agent's own name for one piece of work, such as ``close-4711``. One step of one task stands for one action on one thing with one set of
parameters at one audience, for as long as the task is remembered. Who retries it, with whatever token, is told what became of it.

Between claim and settlement only the service that claimed it knows what happened. When it says nothing in time, nobody may guess: the
action is indeterminate, and stays so until that service settles it by what it has on record itself.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from broker.errors import Conflict, Invalid, InvalidJson, Refused
from broker.spiffe import SpiffeId, strictjson
from broker.spiffe.jose import b64url_encode
from broker.tasks.authority import ACTION
from broker.tasks.claims import TaskClaims
from broker.tasks.constraints import MAX_TEXT
from broker.tasks.reference import ONCE
from broker.tasks.resource import Resource
from broker.tasks.texts import DIGEST, check_id

MAX_STEP: Final = 255
"""Longest name of a step, in characters: as an idempotency key."""
MAX_OUTCOME: Final = 1024
"""Longest outcome, in bytes of JSON: what a retry has to know, such as a number. More belongs where the service keeps it."""
MAX_PER_TASK: Final = 10_000
"""Most steps of one task: beyond it a single task could fill the store."""
SETTLE_WITHIN: Final = timedelta(seconds=300)
"""How long a claim waits for its settlement before it is in doubt: longer than a request to a service may take."""

_TEXT: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


class ActionState(StrEnum):
    """Where an action stands. ``indeterminate`` is never written: the clock leads to it."""

    CLAIMED = "claimed"
    """A service is about to do it."""
    INDETERMINATE = "indeterminate"
    """Nobody said in time what became of it."""
    COMPLETED = "completed"
    """It was done; its outcome is kept."""
    RELEASED = "released"
    """It was not done; it may be claimed again."""


class Claimed(StrEnum):
    """What a claim comes to. Values are on the wire."""

    NOW = "claimed"
    """The service does it now."""
    DUPLICATE = "duplicate_suppressed"
    """It was done before: here is the outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """What one step stands for; raises Invalid. ``parameter_digest`` is ``sha-256:`` and base64url of the canonical parameters."""

    audience: Resource
    action: str
    step: str
    identifier: str | None = None
    parameter_digest: str | None = None

    def __post_init__(self) -> None:
        # A family is a permission, and nothing that is done.
        if len(self.action) > MAX_TEXT or ACTION.fullmatch(self.action) is None or self.action.endswith(".*"):
            raise Invalid("the action is not a dotted name", code="invalid_action", hint="as in ticket.close")
        _check_text(self.step, "step", MAX_STEP)
        if self.identifier is not None:
            _check_text(self.identifier, "identifier", MAX_TEXT)
        if self.parameter_digest is not None and DIGEST.fullmatch(self.parameter_digest) is None:
            raise Invalid(
                "the parameter digest is not sha-256: and a hash in base64url",
                code="invalid_parameter_digest",
                hint="hash the parameters in their canonical form (RFC 8785)",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionRecord:
    """One claim and what became of it; raises Invalid. Times are aware. ``id`` is of the claim, ``jti`` of the token behind it.

    ``service`` is who claimed it and alone may settle it. ``state`` is as written: judge it with :func:`effective_action_state`.
    ``outcome`` is canonical JSON, None where there is none.
    """

    id: str
    task: str
    root: str
    service: SpiffeId
    intent: Intent
    jti: str
    claimed_at: datetime
    settle_by: datetime
    state: ActionState = ActionState.CLAIMED
    settled_at: datetime | None = None
    outcome: str | None = None

    def __post_init__(self) -> None:
        for text, what in (
            (self.id, "action's id"),
            (self.task, "task id"),
            (self.root, "root task id"),
            (self.jti, "jti"),
        ):
            check_id(text, what)
        if any(time is not None and time.tzinfo is None for time in (self.claimed_at, self.settle_by, self.settled_at)):
            raise _invalid("one of its times has no time zone")
        is_open = self.state is ActionState.CLAIMED
        if self.state is ActionState.INDETERMINATE or is_open != (self.settled_at is None):
            raise _invalid("its state and its settlement do not fit each other")
        if self.outcome is not None and self.state is not ActionState.COMPLETED:
            raise _invalid("it has an outcome and was not done")


def effective_action_state(record: ActionRecord, now: datetime) -> ActionState:
    """Give the state that counts: a claim past its time is indeterminate."""
    if record.state is ActionState.CLAIMED and now >= record.settle_by:
        return ActionState.INDETERMINATE
    return record.state


def judge_claim(record: ActionRecord, intent: Intent, now: datetime) -> Claimed:
    """Say what a claim of a step is worth of which there is a record: it was done, or may be done now.

    Raises:
        Conflict: the step stands for something else (``idempotency_key_reused``), or somebody does it now (``action_in_progress``).
        Refused: nobody knows whether it was done (``action_indeterminate``).
    """
    if intent != record.intent:
        raise Conflict(
            "this step stands for another action, another thing or other parameters",
            code="idempotency_key_reused",
            hint="another piece of work needs a step of its own; a retry repeats everything",
        )
    match effective_action_state(record, now):
        case ActionState.COMPLETED:
            return Claimed.DUPLICATE
        case ActionState.RELEASED:
            return Claimed.NOW
        case ActionState.CLAIMED:
            raise Conflict(
                "a service is doing this at the moment",
                code="action_in_progress",
                hint="wait until it is settled, and ask again",
            )
    raise Refused(
        f"the action {record.id} was claimed and never settled: nobody here knows whether it was done",
        code="action_indeterminate",
        hint=f"the service that claimed it settles {record.id} by what it knows: completed or released",
    )


def settle(
    record: ActionRecord, service: SpiffeId, state: ActionState, outcome: str | None, now: datetime
) -> ActionRecord:
    """Settle a claim as completed or released, also when it is indeterminate; the same record when it stands so already.

    ``outcome`` is canonical, see :func:`read_outcome`. Raises Refused for another service (``action_not_own``), Conflict when it
    was settled otherwise (``action_settled``), Invalid for a state that settles nothing, and for an outcome of what was not done.
    """
    if service != record.service:
        raise Refused("another service claimed this action", code="action_not_own")
    if state not in {ActionState.COMPLETED, ActionState.RELEASED}:
        raise Invalid("an action is settled as completed or released", code="invalid_settlement")
    if outcome is not None and state is ActionState.RELEASED:
        raise Invalid("what was not done has no outcome", code="invalid_settlement")
    if record.state is not ActionState.CLAIMED:
        if (record.state, record.outcome) == (state, outcome):
            return record
        raise Conflict(f"the action was settled before, as {record.state.value}", code="action_settled")
    # A stepped clock must not let it end before it began.
    return replace(record, state=state, outcome=outcome, settled_at=max(now, record.claimed_at))


def read_outcome(text: str) -> str | None:
    """Read a JSON text and give its one canonical form, None for an empty text; raises Invalid (``invalid_outcome``)."""
    if not text:
        return None
    try:
        canonical = strictjson.canonical(strictjson.loads(text.encode(), max_bytes=4 * MAX_OUTCOME))
    except (InvalidJson, UnicodeEncodeError):
        raise _no_outcome("the outcome is no JSON text, is too long, or has numbers that are not whole") from None
    if len(canonical) > MAX_OUTCOME:
        raise _no_outcome(f"the outcome is longer than {MAX_OUTCOME} bytes")
    return canonical.decode()


def digest_of_parameters(parameters: object) -> str:
    """Give ``sha-256:`` and the hash of parameters in their canonical form (RFC 8785); raises InvalidJson for what has none."""
    return "sha-256:" + b64url_encode(hashlib.sha256(strictjson.canonical(parameters)).digest())


def is_single_use(claims: TaskClaims) -> bool:
    """Tell whether a token serves one action and no other."""
    return claims.task.use == ONCE


def require_parameters(claims: TaskClaims, intent: Intent) -> None:
    """Refuse parameters that the token is not for; raises Refused (``parameters_mismatch``)."""
    bound = claims.task.parameter_digest
    if bound is not None and bound != intent.parameter_digest:
        raise Refused(
            "the token is for this action with other parameters",
            code="parameters_mismatch",
            hint="do exactly what was approved, or ask for a token for these parameters",
        )


def _check_text(text: str, what: str, longest: int) -> None:
    if len(text) > longest or _TEXT.fullmatch(text) is None:
        raise Invalid(f"the {what} is not 1 to {longest} printable ASCII characters", code=f"invalid_{what}")


def _no_outcome(message: str) -> Invalid:
    return Invalid(message, code="invalid_outcome", hint=f"a short JSON text of at most {MAX_OUTCOME} bytes")


def _invalid(what: str) -> Invalid:
    return Invalid(f"the action's record is not valid: {what}", code="invalid_action_record")
