"""Selectors: one fact about a process or node as ``type:value``, such as ``unix:uid:1000``.

Responsible for the text form only. Which selectors exist, how strong they are and what they match is not known here.
"""

import re
from dataclasses import dataclass, field
from typing import Final, Self

from typing_extensions import override

from broker.errors import InvalidSelector

MAX_TYPE: Final = 64
"""Longest type, in characters: it is the name of an attestor, which is short."""
MAX_VALUE: Final = 4096
"""Longest value, in UTF-8 bytes: a file path (PATH_MAX) must fit; more would only fill stores and logs."""

_TYPE: Final = re.compile(r"[a-z0-9_-]+")
# Everything but control characters, line and paragraph separators, and lone surrogates (which are not text).
_VALUE: Final = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


@dataclass(frozen=True, slots=True, order=True, repr=False)
class Selector:
    """A selector, read from ``type:value``; raises InvalidSelector. Equal text is an equal selector, and only that."""

    _text: str
    type: str = field(init=False, compare=False)
    value: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self._text, str):
            raise InvalidSelector("the selector is not text")
        kind, colon, value = self._text.partition(":")
        if not colon:
            raise InvalidSelector(
                "the selector has no colon",
                code="selector_no_colon",
                hint="write it as type:value, as in unix:uid:1000",
            )
        _check_type(kind)
        _check_value(value)
        object.__setattr__(self, "type", kind)
        object.__setattr__(self, "value", value)

    @classmethod
    def of(cls, kind: str, value: str) -> Self:
        """Join a type and a value; raises InvalidSelector."""
        # The type is judged before the join: a colon in it would move the boundary to another selector.
        _check_type(kind)
        return cls(f"{kind}:{value}")

    @override
    def __str__(self) -> str:
        return self._text

    @override
    def __repr__(self) -> str:
        return f"Selector({self._text!r})"


def _check_type(kind: str) -> None:
    # The first two, and that of an empty value, in SPIRE's words.
    if not kind:
        raise InvalidSelector("missing selector type", code="selector_bad_type")
    if ":" in kind:
        raise InvalidSelector("selector type contains ':'", code="selector_bad_type")
    if len(kind) > MAX_TYPE or _TYPE.fullmatch(kind) is None:
        raise InvalidSelector(
            "the selector type is too long or holds a character that is not allowed",
            code="selector_bad_type",
            hint=f"1 to {MAX_TYPE} of a-z, 0-9, dash and underscore",
        )


def _check_value(value: str) -> None:
    if not value:
        raise InvalidSelector("missing selector value", code="selector_empty_value")
    if _VALUE.fullmatch(value) is None:
        raise InvalidSelector(
            "the selector value holds a control character or is not Unicode text", code="selector_bad_value"
        )
    if len(value.encode()) > MAX_VALUE:
        raise InvalidSelector(f"the selector value is longer than {MAX_VALUE} bytes", code="selector_value_too_long")
