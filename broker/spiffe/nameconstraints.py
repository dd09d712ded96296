"""Name constraints of an authority, held against the names below it (RFC 5280 §4.2.1.10).

DNS and URI constraints are processed. A constraint of another kind that meets a name of that kind is refused, because
ignoring it would widen what the authority may vouch for.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from broker.errors import InvalidSvid

MAX_COMPARISONS: Final = 4096
"""Most comparisons of a name with a constraint for one authority: more is a denial of service."""

_DNS: Final = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_URI_CONSTRAINT: Final = re.compile(r"\.?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_URI_HOST: Final = re.compile(r"[a-z][a-z0-9+.-]*://([^/?#@:\[\]]+)(?:[/?#].*)?", re.DOTALL)
_IP_LIKE: Final = re.compile(r"[0-9.]+")
_SIMPLE: Final = (x509.DNSName, x509.UniformResourceIdentifier)


def check(constraints: x509.NameConstraints, names: Sequence[x509.GeneralName], subject: x509.Name) -> None:
    """Refuse names outside of what an authority above may vouch for; raises InvalidSvid."""
    permitted = constraints.permitted_subtrees or []
    excluded = constraints.excluded_subtrees or []
    if (len(permitted) + len(excluded)) * len(names) > MAX_COMPARISONS:
        raise InvalidSvid("there are too many names and name constraints", code="svid_name_constraints")
    _refuse_unprocessed((*permitted, *excluded), names, subject)
    for kind, permits, excludes in (
        (x509.DNSName, _dns_permits, _dns_excludes),
        (x509.UniformResourceIdentifier, _uri_permits, _uri_excludes),
    ):
        wanted, unwanted = _texts(permitted, kind), _texts(excluded, kind)
        if not wanted and not unwanted:
            continue
        grammar = _DNS if kind is x509.DNSName else _URI_CONSTRAINT
        if any(text and grammar.fullmatch(text) is None for text in (*wanted, *unwanted)):
            raise InvalidSvid("a name constraint is malformed", code="svid_name_constraints")
        for text in _texts(names, kind):
            host = _dns_name(text) if kind is x509.DNSName else _uri_host(text)
            if any(excludes(host, limit) for limit in unwanted) or (
                wanted and not any(permits(host, limit) for limit in wanted)
            ):
                raise InvalidSvid("a name is outside of an authority's name constraints", code="svid_name_constraints")


def _refuse_unprocessed(
    limits: Iterable[x509.GeneralName], names: Sequence[x509.GeneralName], subject: x509.Name
) -> None:
    for kind in {type(limit) for limit in limits} - set(_SIMPLE):
        met = any(isinstance(name, kind) for name in names)
        met = met or (kind is x509.DirectoryName and bool(subject.rdns))
        met = met or (kind is x509.RFC822Name and bool(subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS)))
        if met:
            raise InvalidSvid("a name constraint cannot be processed", code="svid_name_constraints")


def _texts(names: Iterable[x509.GeneralName], kind: type[x509.DNSName | x509.UniformResourceIdentifier]) -> list[str]:
    return [_lower(name.value) for name in names if isinstance(name, kind)]


def _lower(text: str) -> str:
    # Only ASCII folds here: str.lower() would turn the Kelvin sign into a k.
    if not text.isascii():
        raise InvalidSvid("a name is not ASCII", code="svid_name_constraints")
    return text.lower()


def _dns_name(text: str) -> str:
    if _DNS.fullmatch(text.removeprefix("*.")) is None:
        raise InvalidSvid("a DNS name is malformed", code="svid_name_constraints")
    return text


def _uri_host(text: str) -> str:
    match = _URI_HOST.fullmatch(text)
    if match is None or _DNS.fullmatch(match[1]) is None or _IP_LIKE.fullmatch(match[1]):
        raise InvalidSvid("a URI has no host that constraints could apply to", code="svid_name_constraints")
    return match[1]


def _below(name: str, limit: str) -> bool:
    return not limit or name == limit or name.endswith("." + limit)


def _dns_permits(name: str, limit: str) -> bool:
    return _below(name.removeprefix("*."), limit)


def _dns_excludes(name: str, limit: str) -> bool:
    # A wildcard is excluded already where one of the names it stands for is.
    return _below(name.removeprefix("*."), limit) or (name.startswith("*.") and _below(limit, name[2:]))


def _uri_permits(host: str, limit: str) -> bool:
    return host.endswith(limit) if limit.startswith(".") else host == limit


def _uri_excludes(host: str, limit: str) -> bool:
    # Libraries differ on whether a host stands for its subdomains; where it forbids, it does.
    return _below(host, limit.removeprefix("."))
