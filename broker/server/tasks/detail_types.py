"""The registered types of authorization details: which an operator allows, with which actions and members (RFC 9396 §2, §5).

The form of a detail is one for all types and is judged where it is read; here an operator narrows what may be asked for at all.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from broker.errors import Invalid, Misconfigured
from broker.tasks import Authority, AuthorizationDetail
from broker.tasks.authority import ACTION, OPTIONAL_MEMBERS, TYPES


@dataclass(frozen=True, slots=True)
class DetailType:
    """One registered type; raises Misconfigured. No ``actions`` are given: any; ``members`` are those beyond the required ones."""

    name: str
    actions: tuple[str, ...] = ()
    members: frozenset[str] = OPTIONAL_MEMBERS

    def __post_init__(self) -> None:
        """Check each field."""
        if self.name not in TYPES:
            raise Misconfigured(
                f"the type {self.name} of authorization details is not known",
                code="detail_type",
                hint=f"known are {', '.join(sorted(TYPES))}",
            )
        if not self.members <= OPTIONAL_MEMBERS:
            raise Misconfigured(f"the type {self.name} names a member that is not known", code="detail_members")
        if not all(ACTION.fullmatch(action) for action in self.actions):
            raise Misconfigured(f"the type {self.name} names an action that is not one", code="detail_actions")

    def allows(self, detail: AuthorizationDetail) -> bool:
        """Tell whether a detail stays within this."""
        present = detail.to_json().keys() & OPTIONAL_MEMBERS
        return present <= self.members and (not self.actions or all(map(self._allows_action, detail.actions)))

    def _allows_action(self, action: str) -> bool:
        return any(action == mine or (mine.endswith(".*") and action.startswith(mine[:-1])) for mine in self.actions)


_ALL: Final[Mapping[str, DetailType]] = MappingProxyType({name: DetailType(name) for name in sorted(TYPES)})


@dataclass(frozen=True, slots=True)
class DetailTypes:
    """The registered types by name; all that are known, unless an operator registers some."""

    by_name: Mapping[str, DetailType] = field(default_factory=lambda: _ALL)

    @classmethod
    def of(cls, types: Iterable[DetailType]) -> "DetailTypes":
        """Register some; none leaves all. Raises Misconfigured for a name that is there twice."""
        known = tuple(types)
        if len({one.name for one in known}) != len(known):
            raise Misconfigured("a type of authorization details is there twice", code="detail_type_twice")
        return cls(MappingProxyType({one.name: one for one in known})) if known else cls()

    @property
    def names(self) -> frozenset[str]:
        """Name them."""
        return frozenset(self.by_name)

    def require(self, authority: Authority) -> None:
        """Refuse what is not registered so; raises Invalid(code="invalid_authorization_details")."""
        for detail in authority.details:
            kind = self.by_name.get(detail.type)
            if kind is None or not kind.allows(detail):
                raise Invalid(
                    "a detail has a type, member or action that is not registered here",
                    code="invalid_authorization_details",
                    hint=f"registered are {', '.join(sorted(self.by_name))}",
                )
