"""What an HTTP resource takes and gives, said beside its endpoint: ``@described(Operation(…))``. The OpenAPI document is made of it.

A test asserts that every route is described, and that what the endpoints really answer is what is said here.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, TypeVar

Schema = Mapping[str, Any]
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

TEXT: Final[Schema] = MappingProxyType({"type": "string"})
_NONE: Final[Mapping[str, Schema]] = MappingProxyType({})


class Vocabulary(StrEnum):
    """In whose words an endpoint refuses."""

    OAUTH = "oauth"
    """RFC 6749 §5.2, RFC 8693 §2.2.2."""
    PLAIN = "plain"
    """Our own codes, by the status that fits."""
    SET = "set"
    """RFC 8935 §2.3."""
    NONE = "none"
    """It refuses nothing: a public document."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One form parameter; one that ``repeats`` may be sent several times. ``schema`` is of one value."""

    name: str
    text: str
    schema: Schema = field(default_factory=lambda: TEXT)
    required: bool = False
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """One success: what it means, and its body's schema by media type; no media type, no body."""

    text: str
    content: Mapping[str, Schema] = field(default_factory=lambda: _NONE)


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint: ``id`` is stable; ``form`` are the parameters of its body, ``headers`` those that it looks at.

    ``body`` is the schema of a JSON body by media type, for an endpoint that takes no form, or both.
    """

    id: str
    summary: str
    answers: Mapping[int, Answer]
    vocabulary: Vocabulary = Vocabulary.PLAIN
    form: tuple[Parameter, ...] = ()
    headers: tuple[Parameter, ...] = ()
    body: Mapping[str, Schema] = field(default_factory=lambda: _NONE)
    public: bool = False
    """No certificate is needed."""
    known_by: tuple[str, ...] = ()
    """How a caller is known otherwise, any one of them: names of ``securitySchemes``, empty for one that needs nothing more."""
    form_optional: bool = False
    query: tuple[Parameter, ...] = ()
    """Parameters in the address, none of them required."""


_OPERATIONS: Final[dict[Callable[..., Any], Operation]] = {}


def described(operation: Operation) -> Callable[[Endpoint], Endpoint]:
    """Say what an endpoint takes and gives; put directly on its function or method."""

    def remember(endpoint: Endpoint) -> Endpoint:
        _OPERATIONS[endpoint] = operation
        return endpoint

    return remember


def operation_of(endpoint: Callable[..., Any]) -> Operation | None:
    """Give what was said of a route's endpoint, through whatever wraps it; None where nothing was."""
    inner = inspect.unwrap(endpoint)
    return _OPERATIONS.get(getattr(inner, "__func__", inner))
