"""Octets in JSON: how node attestors' messages carry bytes, read strictly.

One copy of each member, exactly the members that are wanted, one form of each value. What the bytes mean is not known
here.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Final

from broker.errors import InvalidJson
from broker.spiffe.strictjson import JsonValue, loads

MAX_MESSAGE: Final = 64 * 1024
"""Bytes of evidence, challenge or response: what the server takes of any attestor."""

_DEPTH: Final = 4  # of the JSON; it needs two


def read(message: bytes) -> JsonValue:
    """Read one message; raises InvalidJson."""
    return loads(message, max_bytes=MAX_MESSAGE, max_depth=_DEPTH)


def members(value: JsonValue, *names: str) -> Mapping[str, JsonValue]:
    """Give an object of exactly these members; raises InvalidJson."""
    # Exactly these: Go folds the case of names, so that a second copy could mean something else elsewhere.
    if not isinstance(value, dict) or value.keys() != set(names):
        raise InvalidJson(f"it is not an object of {', '.join(names)}")
    return value


def octets(value: JsonValue, limit: int = MAX_MESSAGE) -> bytes:
    """Decode base64 text of at most ``limit`` bytes; raises InvalidJson."""
    if not isinstance(value, str):
        raise InvalidJson("a value is not base64 text")
    try:
        decoded = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidJson("a value is not base64 text") from None
    if len(decoded) > limit or text(decoded) != value:
        raise InvalidJson("a value is too long, or not in its one base64 form")
    return decoded


def text(decoded: bytes) -> str:
    """Write bytes as base64 text."""
    return base64.b64encode(decoded).decode()
