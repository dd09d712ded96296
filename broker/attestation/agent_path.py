"""How an operator names the agents of a node attestor: SPIRE's agent path template without its functions.

Literal text and a closed set of fields; each field is one segment of the path, so that two nodes never share a path by
the way their fields are joined. Where the values come from is not known here.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from broker.errors import Invalid, NotAttested
from broker.spiffe import SpiffeId, TrustDomain

PLUGIN: Final = "PluginName"
"""The field that every template starts with: an attestor names nodes below its own name only."""

_FIELD: Final = re.compile(r"\{\{[ \t]*\.([A-Za-z0-9_.]+)[ \t]*\}\}")
_LITERAL: Final = re.compile(r"[A-Za-z0-9._/-]*")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+")
_ANYWHERE: Final = TrustDomain("example.org")


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields that a template may hold: names, or ``Name.`` for every name that starts so."""

    own: Collection[str]
    """Differ from node to node."""
    shared: Collection[str] = (PLUGIN, "TrustDomain")
    paths: Collection[str] = ()
    """Those of the node's own that are a path of several segments, judged by whoever gives them."""

    def is_own(self, name: str) -> bool:
        """Tell whether a field differs from node to node."""
        prefix, dot, rest = name.partition(".")
        if dot and f"{prefix}." in self.own:
            return bool(rest) and "." not in rest
        return name in self.own


@dataclass(frozen=True, slots=True)
class PathTemplate:
    """A template that was read."""

    parts: tuple[str, ...]  # literal, field, literal, …, literal
    fields: Fields

    @classmethod
    def parse(cls, text: str, fields: Fields, *, plugin: str) -> Self:
        """Read it; raises ValueError for what could not name one node below the attestor's own name."""
        parts = tuple(_FIELD.split(text.removeprefix("/")))
        names = parts[1::2]
        for name in names:
            if name not in fields.shared and not fields.is_own(name):
                raise ValueError(f"agent_path_template: .{name} is no field here")
        if not all(_LITERAL.fullmatch(literal) for literal in parts[::2]):
            raise ValueError(
                "agent_path_template: beside fields such as {{ .PluginName }} only letters, digits and -._/"
            )
        if not any(fields.is_own(name) for name in names):
            raise ValueError("agent_path_template: without a field of the node's own all nodes have one name")
        if not _joined(parts, {PLUGIN: plugin}).startswith(f"{plugin}/"):
            raise ValueError("agent_path_template: it starts with {{ .PluginName }}/")
        return cls(parts, fields)

    def path(self, values: Mapping[str, str]) -> str:
        """Fill it in; raises NotAttested where a value is missing, or is no part of a path."""
        for name in self.parts[1::2]:
            if name not in self.fields.paths and _SEGMENT.fullmatch(values.get(name, "")) is None:
                raise NotAttested(f"the node has no usable .{name} for its path", code="agent_path")
        path = f"/{_joined(self.parts, values)}"
        try:
            SpiffeId.of(_ANYWHERE, path)
        except Invalid as error:
            raise NotAttested(f"the agent's path: {error.message}", code="agent_path") from None
        return path


def _joined(parts: Sequence[str], values: Mapping[str, str]) -> str:
    return "".join(values.get(part, "") if number % 2 else part for number, part in enumerate(parts))
