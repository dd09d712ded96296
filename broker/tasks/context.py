"""What a requester says of its own transaction, as flat values: ``rctx`` and ``tctx`` of a transaction token.

Its word and nothing more: no rule of ours grants by it. Bounded and flat, because it travels in every call.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

from broker.errors import Invalid, InvalidJson, PolicyDenied
from broker.spiffe import strictjson
from broker.spiffe.strictjson import MAX_EXACT, JsonValue

Context: TypeAlias = Mapping[str, JsonValue]

MAX_CONTEXT: Final = 1024
"""Bytes of one context as JSON: a handful of ids."""
MAX_MEMBERS: Final = 16
NO_CONTEXT: Final[Context] = MappingProxyType({})

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_VALUE: Final = re.compile(r"[\x20-\x7e]{1,256}")


def parse_context(text: str) -> Context:
    """Read a JSON object from a parameter; raises Invalid (``invalid_context``)."""
    try:
        return read_context(strictjson.loads(text.encode(), max_bytes=MAX_CONTEXT))
    except (InvalidJson, UnicodeEncodeError):
        raise _invalid(f"it is not JSON of at most {MAX_CONTEXT} bytes") from None


def read_context(value: JsonValue) -> Context:
    """Check a context: short names, and texts, whole numbers and truths as values; raises Invalid."""
    if not isinstance(value, dict) or len(value) > MAX_MEMBERS:
        raise _invalid(f"it is not an object of at most {MAX_MEMBERS} members")
    for name, member in value.items():
        if _NAME.fullmatch(name) is None:
            raise _invalid("a name is not short and plain")
        if isinstance(member, str):
            fits = _VALUE.fullmatch(member) is not None
        else:
            fits = isinstance(member, int) and abs(member) <= MAX_EXACT
        if not fits:
            raise _invalid("a value is not a short printable text, a whole number or a truth value")
    return MappingProxyType({name: value[name] for name in sorted(value)})


def extend(earlier: Context, more: Context) -> Context:
    """Add members; raises PolicyDenied (``txn_context_changed``) for one that would change."""
    for name, value in more.items():
        # True and 1 are equal in Python, and not in JSON.
        if name in earlier and (earlier[name] != value or type(earlier[name]) is not type(value)):
            raise PolicyDenied(
                "a replacement may add to the context, not change it",
                code="txn_context_changed",
                hint="leave out what the token says already",
            )
    return read_context({**earlier, **more})


def _invalid(what: str) -> Invalid:
    return Invalid(f"the context is not valid: {what}", code="invalid_context")
