"""Who stands behind a selector, as the attestors in use document it: the kernel, a runtime, or the workload alone.

Knows the attestors' documentation, not their answers. A selector that no attestor in use documents has no strength: no
entry may rest on it alone.
"""

from collections.abc import Iterable
from typing import Final

from broker.attestation.contract import SelectorDoc, Strength, WorkloadAttestor
from broker.spiffe import Selector

_STRONG: Final = frozenset({Strength.KERNEL, Strength.RUNTIME})


class Strengths:
    """The documented kinds of selectors, for looking one up."""

    def __init__(self, docs: Iterable[SelectorDoc]) -> None:
        """Read the forms: ``unix:uid:<number>`` is every selector that begins with ``unix:uid:``.

        ``<prefix>:<value>`` is every selector of a type that no other form has.
        """
        self._by_type: dict[str, list[tuple[str, bool, Strength]]] = {}
        for doc in docs:
            fixed, opening, _ = doc.form.partition("<")
            self._by_type.setdefault(fixed.partition(":")[0], []).append((fixed, bool(opening), doc.strength))
        self._any_type = self._by_type.pop("", [])
        for forms in self._by_type.values():
            # The longest form that fits is the one that is meant.
            forms.sort(key=lambda form: -len(form[0]))

    @classmethod
    def of_attestors(cls, attestors: Iterable[WorkloadAttestor]) -> "Strengths":
        """Read what these attestors document."""
        return cls(doc for attestor in attestors for doc in attestor.selectors)

    def of(self, selector: Selector) -> Strength | None:
        """Give the strength of a selector; None: no attestor in use gives such a one."""
        text = str(selector)
        for fixed, is_open, strength in self._by_type.get(selector.type, self._any_type):
            if text == fixed or (is_open and text.startswith(fixed)):
                return strength
        return None

    def is_vouched(self, selector: Selector) -> bool:
        """Say whether the kernel or a runtime stands behind it, and not the workload alone."""
        return self.of(selector) in _STRONG
