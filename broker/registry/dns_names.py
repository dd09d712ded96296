"""DNS names of X.509-SVIDs. The rules and words are SPIRE's, where a name that it lets pass could be a host's. Pure.

Responsible for names alone; whose they are is not known here.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

from broker.errors import Invalid

MAX_DNS_NAMES: Final = 64
"""Most DNS names of one certificate: more would make every handshake of the workload large."""
MAX_DNS_NAME: Final = 253
"""Longest DNS name, in characters (RFC 1035 §2.3.4, without the final dot)."""
MAX_LABEL: Final = 63

# With the underscore: hosts of Compose and Windows have it, and every TLS library takes it.
_CHARACTERS: Final = re.compile(r"[a-z0-9_.-]+")
_ENCODED: Final = "xn--"


def checked_dns_names(names: Iterable[str]) -> tuple[str, ...]:
    """Give DNS names in lower case and their order, each once; raises Invalid (code ``invalid_dns_name``)."""
    checked = tuple(dict.fromkeys(_checked(name) for name in names))
    if len(checked) > MAX_DNS_NAMES:
        raise _invalid(f"there are more than {MAX_DNS_NAMES} of them")
    return checked


def require_no_overlap(names: Iterable[str]) -> None:
    """Raise Invalid where a wildcard covers another name: in a request for one certificate, one of the two is a mistake."""
    there = tuple(names)
    for name in there:
        if not name.startswith("*") and "*." + name.partition(".")[2] in there:
            raise _invalid(f'name "{name}" overlaps with an existing wildcard name in the list: wildcard overlap')


def _checked(name: str) -> str:
    # ASCII first: lower() folds the Kelvin sign to k.
    if not name.isascii():
        raise _invalid("name must be ascii", hint="write international names in their xn-- form")
    lowered = name.lower()
    if lowered.count("*") > 1:
        raise _invalid("too many wildcards")
    if "*" in lowered and not lowered.startswith("*."):
        raise _invalid("wildcard must be first label")
    _check_host(lowered.removeprefix("*."))
    return lowered


def _check_host(name: str) -> None:
    if not name.strip():
        raise _invalid("empty or only whitespace")
    if name.endswith("."):
        raise _invalid("domain ends with dot")
    if _CHARACTERS.fullmatch(name) is None:
        raise _invalid("a character is none of a host's name", hint="letters, digits, dots, dashes and underscores")
    for label in name.split("."):
        if not label:
            raise _no_label(name)
        if len(label) > MAX_LABEL or label.startswith("-") or label.endswith("-") or not _is_plain_or_readable(label):
            raise _no_label(label)
    if len(name) > MAX_DNS_NAME:
        raise _no_label(name)


def _is_plain_or_readable(label: str) -> bool:
    """Tell whether a label says it is encoded, and is (RFC 5891 §4.2.3.1, RFC 3492), or says it is not."""
    if label[2:4] != "--":
        return True
    if not label.startswith(_ENCODED):
        return False
    try:
        text = label[len(_ENCODED) :].encode("ascii").decode("punycode")
        same = text.encode("punycode").decode("ascii") == label[len(_ENCODED) :]
    except (UnicodeError, OverflowError):
        return False
    printable = all(unicodedata.category(one)[0] not in "CZ" for one in text)
    return same and not text.isascii() and printable and unicodedata.normalize("NFKC", text) == text


def _no_label(label: str) -> Invalid:
    return _invalid(f'idna error\nidna: invalid label "{label}"')


def _invalid(what: str, hint: str = "") -> Invalid:
    return Invalid(what, code="invalid_dns_name", hint=hint)
