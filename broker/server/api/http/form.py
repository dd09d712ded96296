"""One strict reader for ``application/x-www-form-urlencoded`` bodies (RFC 6749 §3.2, RFC 8693 §2.1).

A parameter that is unknown, empty or sent twice refuses the request: dropping one in silence is how a delegated exchange
turns into an impersonation. Work is linear in the body, whose size and number of parameters are bounded before anything
is decoded. What a parameter means is not known here.
"""

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote_to_bytes

from starlette.requests import Request

from broker.errors import Invalid

MAX_BODY: Final = 64 * 1024
"""Largest body, in bytes: a token of 8 KiB and authorization details of some KiB fit many times."""
MAX_DRAINED: Final = 8 * 1024 * 1024
"""Bytes of an oversized body that are read and dropped, so that the refusal reaches the caller."""
MAX_PARAMETERS: Final = 64
"""Most parameters in one request: the longest grant has a dozen."""

_CONTENT_TYPE: Final = re.compile(
    r"application/x-www-form-urlencoded(?:[ \t]*;[ \t]*charset=\"?utf-8\"?)?", re.IGNORECASE
)
_ENCODED: Final = re.compile(rb"[\x21-\x24\x26-\x7e]*(?:%[0-9A-Fa-f]{2}[\x21-\x24\x26-\x7e]*)*")
_CONTROL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_PLAIN: Final = re.compile(rb"[\x21-\x24\x26-\x2a\x2c-\x7e]*")
"""What stands for itself: names, ids and tokens do."""


class Form:
    """The parameters of one request: each exactly once, except those that may repeat."""

    def __init__(self, single: Mapping[str, str], repeated: Mapping[str, tuple[str, ...]]) -> None:
        self._single = single
        self._repeated = repeated

    def names(self) -> frozenset[str]:
        """Give the names of all parameters that were sent."""
        return frozenset(self._single) | frozenset(self._repeated)

    def require(self, name: str) -> str:
        """Give a parameter's value; raises Invalid when it was not sent."""
        value = self._single.get(name)
        if value is None:
            raise Invalid(f"the parameter {name} is missing", code="parameter_missing")
        return value

    def get(self, name: str) -> str | None:
        """Give a parameter's value, or None when it was not sent."""
        return self._single.get(name)

    def all(self, name: str) -> tuple[str, ...]:
        """Give every value of a parameter that may repeat, in order."""
        return self._repeated.get(name, ())


async def read_form(
    request: Request,
    *,
    allowed: frozenset[str],
    repeatable: frozenset[str] = frozenset(),
    body_optional: bool = False,
    ignore_unknown: bool = False,
) -> Form:
    """Read a request's form; raises Invalid for everything that does not have exactly one meaning."""
    body = await read_body(request)
    if request.scope.get("query_string"):
        raise Invalid("parameters belong in the body, not in the address", code="parameter_in_query")
    if not body and body_optional:
        return Form({}, {})
    types = request.headers.getlist("content-type")
    if len(types) != 1 or _CONTENT_TYPE.fullmatch(types[0].strip()) is None:
        raise Invalid("the content type must be application/x-www-form-urlencoded", code="content_type")
    return parse_form(body, allowed=allowed, repeatable=repeatable, ignore_unknown=ignore_unknown)


async def read_body(request: Request) -> bytes:
    """Read at most ``MAX_BODY`` bytes; raises Invalid beyond, or for a body that is encoded further."""
    if any(coding != "identity" for coding in request.headers.getlist("content-encoding")):
        raise Invalid("a content encoding is not accepted", code="content_encoding")
    chunks: list[bytes] = []
    size = 0
    is_whole = False
    while not is_whole:
        # The messages themselves: a generator around them costs more than they do.
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Invalid("the request ended early", code="body_incomplete")
        chunk = message.get("body", b"")
        is_whole = not message.get("more_body", False)
        size += len(chunk)
        if size <= MAX_BODY:
            chunks.append(chunk)
        elif size > MAX_DRAINED:
            break
    if size > MAX_BODY:
        raise Invalid(f"the body is larger than {MAX_BODY} bytes", code="body_too_large")
    return b"".join(chunks)


def parse_form(
    body: bytes,
    *,
    allowed: frozenset[str],
    repeatable: frozenset[str] = frozenset(),
    ignore_unknown: bool = False,
) -> Form:
    """Read the parameters; raises Invalid for unknown, empty, repeated or badly encoded ones.

    ``ignore_unknown`` is for the one endpoint whose standard says so.
    """
    if body.count(b"&") >= MAX_PARAMETERS:
        raise Invalid(f"more than {MAX_PARAMETERS} parameters", code="too_many_parameters")
    single: dict[str, str] = {}
    repeated: dict[str, tuple[str, ...]] = {}
    for pair in body.split(b"&") if body else ():
        raw_name, equals, raw_value = pair.partition(b"=")
        name, value = _decoded(raw_name), _decoded(raw_value)
        if name not in allowed:
            if ignore_unknown:
                continue
            # The name is the caller's text: it is not repeated in the answer.
            raise Invalid("a parameter is not known here", code="parameter_unknown")
        if not equals or not value:
            raise Invalid(f"the parameter {name} is empty", code="parameter_empty")
        if name in repeatable:
            repeated[name] = (*repeated.get(name, ()), value)
        elif name in single:
            raise Invalid(f"the parameter {name} was sent more than once", code="parameter_repeated")
        else:
            single[name] = value
    return Form(single, repeated)


def _decoded(raw: bytes) -> str:
    if _PLAIN.fullmatch(raw) is not None:
        return raw.decode("ascii")
    if _ENCODED.fullmatch(raw) is None:
        raise Invalid("a parameter is not form encoded", code="form_encoding")
    try:
        text = unquote_to_bytes(raw.replace(b"+", b" ")).decode("utf-8")
    except UnicodeDecodeError:
        raise Invalid("a parameter is not UTF-8", code="form_encoding") from None
    if _CONTROL.search(text):
        raise Invalid("a parameter holds a control character", code="form_encoding")
    return text
