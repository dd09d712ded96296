"""A resource: the absolute https URI that names a service, or a part of one (RFC 8707 §2).

Responsible for one meaning per text: what is equal compares equal, what two readers could read differently is refused.
Which resources exist is not known here. Normalised for comparison (RFC 3986 §6.2), never fetched.
"""

import ipaddress
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from typing_extensions import override

from broker.errors import Invalid

MAX_RESOURCE: Final = 2048
"""Longest resource, in characters: what HTTP software takes as a URL."""
MAX_HOST: Final = 253
"""Longest DNS name, in characters (RFC 1035 §2.3.4, without the final dot)."""
HTTPS_PORT: Final = 443
SPELLINGS_KEPT: Final = 1_024
"""Texts whose one spelling is not worked out twice, 4 KiB each at most: the same services are named again and again."""

_SCHEME: Final = "https://"
# No user information, query or fragment; the host and the path are looked at more closely afterwards.
_URI: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[1-9][0-9]{0,4}))?(?P<path>/.*)?")
_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
# RFC 3986 §3.3 without the semicolon: some servers cut "..;x" to "..", others do not.
_SEGMENT: Final = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,=:@-]|%[0-9A-Fa-f]{2})+")
_ESCAPE: Final = re.compile(r"%([0-9A-Fa-f]{2})")
_ESCAPES: Final = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
_UNRESERVED: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# What a second reader might decode into structure: separators, another escape, control characters.
_NEVER_ESCAPED: Final = frozenset(b"/\\%;?#") | frozenset(range(0x20)) | {0x7F}


@dataclass(frozen=True, slots=True, repr=False)
class Resource:
    """An absolute https URI without user information, query and fragment; raises Invalid (``invalid_target``).

    Equal resources have equal ``text``: lower-case host, no default port, no slash alone, escapes in one form.
    """

    text: str
    _below: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        text = _normalise(self.text)
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "_below", text if text.endswith("/") else text + "/")

    @override
    def __str__(self) -> str:
        return self.text

    @override
    def __repr__(self) -> str:
        return f"Resource({self.text!r})"

    def contains(self, other: "Resource") -> bool:
        """Tell whether the other is this or lies below it, at a segment boundary: /a holds /a/b and not /ab."""
        return other.text == self.text or other.text.startswith(self._below)


def _normalise(text: object) -> str:
    if not isinstance(text, str):
        raise _invalid("it is not text")
    if len(text) > MAX_RESOURCE:
        raise _invalid(f"it is longer than {MAX_RESOURCE} characters")
    return _spelled(text)


@lru_cache(maxsize=SPELLINGS_KEPT)
def _spelled(text: str) -> str:
    # ASCII before lower(), which folds the Kelvin sign to k.
    if not text.isascii() or text[: len(_SCHEME)].lower() != _SCHEME:
        raise _invalid("it is not an absolute https URI", hint="write it as https://host/path, without user or query")
    parts = _URI.fullmatch(text, len(_SCHEME))
    if parts is None:
        raise _invalid("its host, port or form is not accepted", hint="no user, query or fragment; port without zeros")
    port = int(parts["port"] or HTTPS_PORT)
    if port > 65535:
        raise _invalid("its port is out of range")
    authority = _host(parts["host"]) + ("" if port == HTTPS_PORT else f":{port}")
    path = parts["path"] or ""
    return _SCHEME + authority + ("" if path in ("", "/") else _path(path))


def _host(host: str) -> str:
    lowered = host.lower()
    if lowered.startswith("["):
        try:
            return f"[{ipaddress.IPv6Address(lowered[1:-1]).compressed}]"
        except ValueError:
            raise _invalid("its host is not an IPv6 address") from None
    if len(lowered) > MAX_HOST or not all(_LABEL.fullmatch(label) for label in lowered.split(".")):
        raise _invalid("its host is not a DNS name or address")
    return lowered


def _path(path: str) -> str:
    segments = path[1:].split("/")
    for number, segment in enumerate(segments):
        if not segment:
            # A slash at the end is a resource of its own; an empty segment elsewhere is read differently by servers.
            if number < len(segments) - 1:
                raise _invalid("its path has an empty segment")
        elif _SEGMENT.fullmatch(segment) is None:
            raise _invalid("its path holds a character that is not allowed")
        else:
            segments[number] = _segment(segment)
    return "/" + "/".join(segments)


def _segment(segment: str) -> str:
    plain = _ESCAPE.sub(_one_form, segment) if "%" in segment else segment
    if plain in (".", ".."):
        raise _invalid("its path has a dot segment")
    if "%" in plain:
        _check_utf8(plain)
    return plain


def _one_form(escape: re.Match[str]) -> str:
    byte = int(escape[1], 16)
    if byte in _NEVER_ESCAPED:
        raise _invalid("its path hides a separator or a control character behind an escape")
    return chr(byte) if byte in _UNRESERVED else f"%{byte:02X}"


def _check_utf8(segment: str) -> None:
    for run in _ESCAPES.findall(segment):
        try:
            # Over-long forms of a slash are not UTF-8.
            bytes.fromhex(run.replace("%", "")).decode("utf-8")
        except UnicodeDecodeError:
            raise _invalid("its path holds an escape that is not UTF-8") from None


def _invalid(what: str, hint: str = "") -> Invalid:
    return Invalid(f"the resource is not valid: {what}", code="invalid_target", hint=hint)
