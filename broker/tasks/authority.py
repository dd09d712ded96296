"""What a task may do: RFC 9396 authorization details, and the rule by which one authority is part of another.

Responsible for the details' form and for narrowing; whether somebody may have an authority is decided elsewhere. The
one rule: nothing is ever added. A detail is narrower when one detail of the other covers each of its members; an absent
restriction is the broadest, and what cannot be compared is refused. Empty means nothing, never everything.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from operator import is_
from typing import Final, Self

from broker.errors import Invalid, InvalidJson, PolicyDenied
from broker.spiffe import strictjson
from broker.spiffe.jose import b64url_encode
from broker.spiffe.strictjson import JsonValue
from broker.tasks.constraints import KINDS, MAX_VALUES, invalid, is_within, read_constraints, read_text, read_texts
from broker.tasks.resource import Resource

TYPES: Final = frozenset({"api", "agent_tool"})
"""The registered types of authorization details; both have the same members."""
MAX_DETAILS: Final = 32
"""Most details of one authority: narrowing compares each with each."""
MAX_BYTES: Final = 4096
"""Longest authority as canonical JSON, in bytes: its token must stay below 8 KiB."""

_MEMBERS: Final = frozenset({"type", "locations", "actions", "identifier", "datatypes", "privileges", "constraints"})
_SEAL: Final = object()
_REQUIRED: Final = frozenset({"type", "locations", "actions"})
OPTIONAL_MEMBERS: Final = _MEMBERS - _REQUIRED
"""What a detail may have besides its type, locations and actions."""
# Dotted names of scope characters (RFC 6749 §3.3). A star stands for all below a name, and never alone.
ACTION: Final = re.compile(r"[A-Za-z0-9_:/-]+(?:\.[A-Za-z0-9_:/-]+)*(?:\.\*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizationDetail:
    """One detail (RFC 9396 §2): these actions, at these locations, within these limits. Lists are sorted sets.

    ``identifier``, ``datatypes`` and ``constraints`` restrict: absent is broadest. ``privileges`` grant: absent is none.
    """

    type: str
    locations: tuple[Resource, ...]
    actions: tuple[str, ...]
    identifier: str | None = None
    datatypes: tuple[str, ...] = ()
    privileges: tuple[str, ...] = ()
    constraints: Mapping[str, JsonValue] = field(default_factory=dict, hash=False)
    seal: InitVar[object] = None

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("an AuthorizationDetail comes from its parse() only")

    @classmethod
    def parse(cls, value: JsonValue) -> Self:
        """Read one detail; an unknown type, member or constraint is Invalid (RFC 9396 §5)."""
        if not isinstance(value, dict):
            raise invalid("a detail is not an object")
        kind = value.get("type")
        if not isinstance(kind, str) or kind not in TYPES:
            raise invalid("a detail's type is missing or not known", hint=f"known are {', '.join(sorted(TYPES))}")
        if not value.keys() <= _MEMBERS or not value.keys() >= _REQUIRED:
            raise invalid("a detail has a member that is not known, or lacks type, locations or actions")
        return cls(
            type=kind,
            locations=_locations(value["locations"]),
            actions=_actions(value["actions"]),
            identifier=read_text(value["identifier"], "identifier") if "identifier" in value else None,
            datatypes=read_texts(value["datatypes"], "datatypes") if "datatypes" in value else (),
            privileges=read_texts(value["privileges"], "privileges") if "privileges" in value else (),
            constraints=read_constraints(value["constraints"]) if "constraints" in value else {},
            seal=_SEAL,
        )

    def to_json(self) -> dict[str, JsonValue]:
        """Give the members that are present."""
        value: dict[str, JsonValue] = {
            "type": self.type,
            "locations": [location.text for location in self.locations],
            "actions": list(self.actions),
        }
        if self.identifier is not None:
            value["identifier"] = self.identifier
        if self.datatypes:
            value["datatypes"] = list(self.datatypes)
        if self.privileges:
            value["privileges"] = list(self.privileges)
        if self.constraints:
            value["constraints"] = dict(self.constraints)
        return value

    def covers(self, other: "AuthorizationDetail") -> bool:
        """Tell whether the other asks for no more than this."""
        return (
            other.type == self.type
            and all(any(mine.contains(theirs) for mine in self.locations) for theirs in other.locations)
            and all(self.covers_action(action) for action in other.actions)
            and (self.identifier is None or other.identifier == self.identifier)
            and _restricts(self.datatypes, other.datatypes)
            and _grants(self.privileges, other.privileges)
            and is_within(other.constraints, self.constraints)
        )

    def covers_action(self, action: str) -> bool:
        """Tell whether an action is named here, or lies in a family such as ``invoices.*`` that is."""
        return any(_holds(mine, action) for mine in self.actions)

    def at(self, resource: Resource) -> "AuthorizationDetail | None":
        """Narrow to what concerns a resource: itself where a location holds it, and the locations inside it."""
        if any(location.contains(resource) for location in self.locations):
            locations: tuple[Resource, ...] = (resource,)
        else:
            locations = tuple(location for location in self.locations if resource.contains(location))
        if locations == self.locations:
            return self
        return self._with(locations=locations) if locations else None

    def only(self, actions: tuple[str, ...]) -> "AuthorizationDetail":
        """Narrow to some of the actions; raises PolicyDenied for one that is not covered."""
        if not actions or not all(self.covers_action(action) for action in actions):
            raise PolicyDenied("an action goes beyond the detail", code="invalid_scope")
        return self._with(actions=actions)

    def limits(self) -> frozenset[str]:
        """Name what a service must look at besides action, location and identifier before it acts."""
        return frozenset(self.constraints) | ({"datatypes"} if self.datatypes else frozenset())

    def _with(
        self, *, locations: tuple[Resource, ...] | None = None, actions: tuple[str, ...] | None = None
    ) -> "AuthorizationDetail":
        return AuthorizationDetail(
            type=self.type,
            locations=self.locations if locations is None else locations,
            actions=self.actions if actions is None else actions,
            identifier=self.identifier,
            datatypes=self.datatypes,
            privileges=self.privileges,
            constraints=self.constraints,
            seal=_SEAL,
        )


@dataclass(frozen=True, slots=True)
class Authority:
    """A non-empty set of authorization details, in one order; raises Invalid (``invalid_authorization_details``)."""

    details: tuple[AuthorizationDetail, ...] = field(compare=False)
    _text: str = field(init=False, repr=False)
    _digest: str = field(init=False, repr=False, compare=False)
    _scope: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.details) <= MAX_DETAILS:
            raise invalid(f"there are not 1 to {MAX_DETAILS} details", hint="an empty authority allows nothing")
        by_text = {strictjson.canonical(detail.to_json()).decode(): detail for detail in self.details}
        text = "[" + ",".join(sorted(by_text)) + "]"
        if len(text) > MAX_BYTES:
            raise invalid(f"they are longer than {MAX_BYTES} bytes")
        object.__setattr__(self, "details", tuple(by_text[key] for key in sorted(by_text)))
        object.__setattr__(self, "_text", text)
        # Worked out when they are asked for; one authority is asked with every token of a task.
        object.__setattr__(self, "_digest", "")
        object.__setattr__(self, "_scope", "")

    @classmethod
    def parse(cls, value: JsonValue) -> Self:
        """Read a JSON array, as text or as values; an unknown type or member is Invalid (RFC 9396 §5)."""
        if isinstance(value, str):
            try:
                value = strictjson.loads(value.encode(), max_bytes=2 * MAX_BYTES)
            except (InvalidJson, UnicodeEncodeError):
                raise invalid("they are not a JSON array in UTF-8, or too large") from None
        if not isinstance(value, list) or len(value) > MAX_DETAILS:
            raise invalid(f"they are not a list of at most {MAX_DETAILS} details")
        return cls(tuple(AuthorizationDetail.parse(item) for item in value))

    def to_json(self) -> list[JsonValue]:
        """Give the details as JSON values."""
        return [detail.to_json() for detail in self.details]

    def text(self) -> str:
        """Give the one canonical JSON text: equal authorities have equal text (RFC 8785)."""
        return self._text

    @property
    def digest(self) -> str:
        """``sha-256:`` and the base64url hash of the canonical text."""
        if not self._digest:
            digest = "sha-256:" + b64url_encode(hashlib.sha256(self._text.encode()).digest())
            object.__setattr__(self, "_digest", digest)
        return self._digest

    def narrow(self, requested: "Authority") -> "Authority":
        """Give what is requested if all of it is part of this; raises PolicyDenied, never gives less or more."""
        if requested is self:
            return self
        for detail in requested.details:
            if not any(mine.covers(detail) for mine in self.details):
                raise PolicyDenied(
                    "the requested authorization details go beyond what may be given",
                    code="invalid_authorization_details",
                    hint="ask for actions, locations and limits inside those of the task or delegation",
                )
        return requested

    def for_resource(self, resource: Resource) -> "Authority":
        """Keep what concerns one resource; raises PolicyDenied (``invalid_target``) when nothing is left."""
        details = [narrowed for detail in self.details if (narrowed := detail.at(resource)) is not None]
        if len(details) == len(self.details) and all(map(is_, details, self.details)):
            return self
        return _some(details, "nothing of this authority concerns the resource", "invalid_target")

    def for_scope(self, scope: str) -> "Authority":
        """Keep the actions that a scope names; an action beyond this is PolicyDenied (``invalid_scope``)."""
        wanted = scope.split(" ")
        if len(wanted) > MAX_VALUES or not all(ACTION.fullmatch(action) for action in wanted):
            raise PolicyDenied("the scope is empty, too long or malformed", code="invalid_scope")
        if not all(any(detail.covers_action(action) for detail in self.details) for action in wanted):
            raise PolicyDenied("the scope goes beyond what may be given", code="invalid_scope")
        details = []
        for detail in self.details:
            actions = tuple(sorted({action for action in wanted if detail.covers_action(action)}))
            if actions:
                details.append(detail.only(actions))
        return _some(details, "nothing of this authority is in the scope", "invalid_scope")

    def require_within(self, scopes: Iterable[str]) -> None:
        """Refuse an action that scopes leave out which name its family; raises PolicyDenied (``invalid_scope``).

        With ``ticket.read`` among them nothing else of ``ticket`` is left. A scope without a dot, such as ``openid``, is of
        another vocabulary and says nothing.
        """
        named = [scope for scope in scopes if "." in scope]
        families = {scope.partition(".")[0] for scope in named}
        for action in {action for detail in self.details for action in detail.actions}:
            if action.partition(".")[0] in families and not any(_holds(scope, action) for scope in named):
                raise PolicyDenied(
                    "an action goes beyond the scope of the user's token",
                    code="invalid_scope",
                    hint="the user permits it by a token whose scope names it",
                )

    def scope(self) -> str:
        """Give all actions, sorted, as a scope (RFC 8693 §4.2): a coarse picture of the details."""
        if not self._scope:
            actions = {action for detail in self.details for action in detail.actions}
            object.__setattr__(self, "_scope", " ".join(sorted(actions)))
        return self._scope

    def resources(self) -> tuple[Resource, ...]:
        """Give all locations, sorted, each once."""
        found = {location for detail in self.details for location in detail.locations}
        return tuple(sorted(found, key=lambda resource: resource.text))

    def metered(self) -> frozenset[str]:
        """Name the constraints that need a counter: who has none must refuse them at issue."""
        return frozenset(name for detail in self.details for name in detail.constraints if KINDS[name].is_metered)

    def permits(
        self, action: str, resource: Resource, identifier: str | None = None, *, enforced: Iterable[str] = ()
    ) -> bool:
        """Tell whether some detail allows the action; ``enforced`` names the limits that the asker judges itself."""
        return any(True for _ in self._allowing(action, resource, identifier, frozenset(enforced)))

    def require(
        self, action: str, resource: Resource, identifier: str | None = None, *, enforced: Iterable[str] = ()
    ) -> AuthorizationDetail:
        """Give the detail that allows the action; raises PolicyDenied (``insufficient_authorization``).

        A detail with limits that are not in ``enforced`` allows nothing: somebody must judge them.
        """
        for detail in self._allowing(action, resource, identifier, frozenset(enforced)):
            return detail
        raise PolicyDenied("the authority does not allow this action here", code="insufficient_authorization")

    def _allowing(
        self, action: str, resource: Resource, identifier: str | None, enforced: frozenset[str]
    ) -> Iterable[AuthorizationDetail]:
        return (
            detail
            for detail in self.details
            if detail.covers_action(action)
            and any(location.contains(resource) for location in detail.locations)
            and (detail.identifier is None or detail.identifier == identifier)
            and detail.limits() <= enforced
        )


def _holds(mine: str, action: str) -> bool:
    return action == mine or (mine.endswith(".*") and action.startswith(mine[:-1]))


def _some(details: Iterable[AuthorizationDetail], message: str, code: str) -> Authority:
    kept = tuple(details)
    if not kept:
        raise PolicyDenied(message, code=code)
    return Authority(kept)


def _locations(value: JsonValue) -> tuple[Resource, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_VALUES:
        raise invalid(f"locations is not a list of 1 to {MAX_VALUES} resources")
    try:
        resources = {Resource(read_text(item, "a location")) for item in value}
    except Invalid as error:
        raise invalid(f"a location: {error.message}", hint=error.hint) from None
    return tuple(sorted(resources, key=lambda resource: resource.text))


def _actions(value: JsonValue) -> tuple[str, ...]:
    actions = read_texts(value, "actions")
    if not all(ACTION.fullmatch(action) for action in actions):
        raise invalid("an action is not a dotted name", hint="as in ticket.read, or ticket.* for the family")
    return actions


def _restricts(parent: tuple[str, ...], child: tuple[str, ...]) -> bool:
    return not parent or (bool(child) and set(child) <= set(parent))


def _grants(parent: tuple[str, ...], child: tuple[str, ...]) -> bool:
    # Absent where the other names some could mean none or all: not comparable, so refused.
    return bool(parent) == bool(child) and set(child) <= set(parent)
