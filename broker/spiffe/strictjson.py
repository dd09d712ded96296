"""JSON as the standards mean it: one meaning for one text, or refused (RFC 8259, RFC 7493).

Python's own reader accepts duplicate names, NaN, UTF-16, lone surrogates and numbers that become infinite, and dies of
deep nesting. Here each of these is InvalidJson. What the values mean is not known here.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn, TypeAlias

from broker.errors import InvalidJson

JsonValue: TypeAlias = "str | int | float | bool | list[JsonValue] | dict[str, JsonValue] | None"

MAX_BYTES: Final = 1 << 20
"""Largest document unless the caller says otherwise: a bundle with some hundred authorities fits."""
MAX_DEPTH: Final = 16
"""Deepest nesting of arrays and objects; tokens and bundles need six."""
MAX_INTEGER: Final = 2**64 - 1
"""Largest integer read: a SPIFFE bundle's sequence is 64 bit."""
MAX_EXACT: Final = 2**53 - 1
"""Largest integer written canonically: beyond it other JSON readers round (RFC 8785 §3.2.2.3)."""

_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS: Final = re.compile(rb"[\[\]{}]")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_BOM: Final = b"\xef\xbb\xbf"


def loads(data: bytes, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> JsonValue:
    """Read one JSON text in UTF-8; raises InvalidJson. ``max_depth`` counts nested arrays and objects."""
    if len(data) > max_bytes:
        raise InvalidJson(f"the JSON text is larger than {max_bytes} bytes", code="json_too_large")
    if data.startswith(_BOM):
        raise InvalidJson("the JSON text starts with a byte order mark", code="json_byte_order_mark")
    _check_depth(data, max_depth)
    try:
        value: JsonValue = _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise InvalidJson("the JSON text is not UTF-8", code="json_not_utf8") from None
    except ValueError:
        # The reader's own message may quote the text, which may be a token's content.
        raise InvalidJson("the text is not JSON") from None
    if b"\\ud" in data or b"\\uD" in data:
        _check_surrogates(value)
    return value


def canonical(value: object) -> bytes:
    """Write a value in its one canonical form (RFC 8785, without floats and integers beyond 2^53); raises InvalidJson."""
    try:
        return _WRITER.encode(_ordered(value, MAX_DEPTH)).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidJson("a string is not Unicode text", code="json_surrogate") from None


def canonical_of_known(value: object) -> bytes:
    """Do as :func:`canonical` for a value whose parts were all judged before; ``canonical`` looks at each again.

    Whoever calls vouches for it: names in ASCII, text without lone surrogates, no number but integers up to ``MAX_EXACT``.
    """
    return _KNOWN_WRITER.encode(value).encode("utf-8")


def _check_depth(data: bytes, max_depth: int) -> None:
    # Few opening brackets cannot nest deeply: the usual token is done here.
    if data.count(b"[") + data.count(b"{") <= max_depth:
        return
    depth = 0
    for bracket in _BRACKETS.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise InvalidJson(f"the JSON text is nested deeper than {max_depth}", code="json_too_deep")


def _check_surrogates(value: JsonValue) -> None:
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise InvalidJson("the JSON text holds a lone surrogate", code="json_surrogate")
    elif isinstance(value, list):
        for item in value:
            _check_surrogates(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_surrogates(name)
            _check_surrogates(item)


def _unique(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise InvalidJson("the JSON text holds a name twice in one object", code="json_duplicate_name")
    return members


def _refuse_constant(_: str) -> NoReturn:
    raise InvalidJson("NaN and Infinity are not JSON", code="json_not_a_number")


def _integer(text: str) -> int:
    # Judged by length first: int() of a megabyte of digits is slow, and of more than 4,300 it fails oddly.
    number = int(text) if len(text) <= len(str(MAX_INTEGER)) + 1 else MAX_INTEGER + 1
    if abs(number) > MAX_INTEGER:
        raise InvalidJson("an integer is out of range", code="json_number_range")
    return number


def _real(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise InvalidJson("a number is out of range", code="json_number_range")
    return number


def _ordered(value: object, depth: int) -> object:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        if abs(value) > MAX_EXACT:
            raise InvalidJson(
                "an integer is beyond 2^53", code="json_number_range", hint="write large numbers as strings"
            )
        return value
    if depth == 0:
        raise InvalidJson(f"the value is nested deeper than {MAX_DEPTH}", code="json_too_deep")
    if isinstance(value, Mapping):
        # Text, which most members are, is written as it is: a call for each would be half of the work.
        return {
            name: member if type(member := value[name]) is str else _ordered(member, depth - 1)
            for name in _in_order(value)
        }
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [_ordered(item, depth - 1) for item in value]
    raise InvalidJson(f"a {type(value).__name__} has no canonical form", code="json_bad_type")


def _in_order(names: Mapping[object, object]) -> list[str]:
    texts = [name for name in names if isinstance(name, str)]
    if len(texts) != len(names):
        raise InvalidJson("a member's name is not a string", code="json_bad_name")
    # RFC 8785 §3.2.3 sorts by UTF-16 code units, which is not Python's order beyond U+FFFF.
    texts.sort(key=None if "".join(texts).isascii() else _utf16)
    return texts


def _utf16(name: str) -> bytes:
    return name.encode("utf-16-be")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_real
)
_WRITER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_KNOWN_WRITER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True)
