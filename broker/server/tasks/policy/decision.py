"""A decision of the policy, as a value with all its reasons: the same object answers the caller, the record and the explanation."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from broker.errors import PolicyDenied


class Effect(StrEnum):
    """What the policy says. Only ``allow`` lets anything happen."""

    ALLOW = "allow"
    DENY = "deny"
    APPROVAL = "approval"
    """It would be allowed, if a person approved it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a bundle said, and why.

    ``rules`` are the ``@id`` of the rules that decided (none: no rule permits it), ``advice`` their ``@advice``, ``errors`` what
    could not be evaluated: any error denies. ``bundle`` is the hash of the bundle, ``sha-256:…``.
    """

    effect: Effect
    bundle: str
    rules: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()

    @property
    def is_allowed(self) -> bool:
        """Tell whether it may happen."""
        return self.effect is Effect.ALLOW

    @property
    def code(self) -> str:
        """The stable code of the answer."""
        return {Effect.ALLOW: "allowed", Effect.DENY: "policy_denied", Effect.APPROVAL: "approval_required"}[
            self.effect
        ]

    @property
    def message(self) -> str:
        """One sentence for people."""
        named = ", ".join(self.rules)
        match self.effect:
            case Effect.ALLOW:
                return f"permitted by {named}"
            case Effect.APPROVAL:
                return f"the policy wants a person's approval: {named}"
            case _ if self.errors:
                return "the policy could not be evaluated, which denies" + (f"; besides: {named}" if named else "")
            case _ if named:
                return f"denied by the policy: {named}"
        return "no rule of the policy permits it"

    @property
    def hint(self) -> str:
        """What to do next: the rules' own advice."""
        if self.advice:
            return "; ".join(self.advice)
        if self.effect is Effect.APPROVAL:
            return "a person has to approve it: broker approval list shows what waits"
        if self.errors:
            return "an operator sees the error with broker policy explain"
        return "broker policy explain says which rules were asked"

    def require(self) -> Self:
        """Give itself if it allows; raises DeniedByPolicy."""
        if not self.is_allowed:
            raise DeniedByPolicy(self)
        return self


class DeniedByPolicy(PolicyDenied):
    """The operator's policy says no (``policy_denied``), or wants a person first (``approval_required``)."""

    def __init__(self, decision: Decision) -> None:
        """Carry the decision, for the record."""
        super().__init__(decision.message, code=decision.code, hint=decision.hint)
        self.decision = decision


def all_of(decisions: Iterable[Decision], *, bundle: str) -> Decision:
    """Give the one answer to several questions that belong together: all must be allowed. Of no question it is a denial."""
    found = tuple(decisions)
    worst = next((e for e in (Effect.DENY, Effect.APPROVAL) if any(d.effect is e for d in found)), Effect.ALLOW)
    if not found:
        return Decision(Effect.DENY, bundle, advice=("nothing registered is concerned by it",))
    telling = [one for one in found if one.effect is worst]
    return Decision(
        worst,
        bundle,
        _each(rule for one in telling for rule in one.rules),
        _each(text for one in telling for text in one.advice),
        _each(text for one in telling for text in one.errors),
    )


def _each(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
