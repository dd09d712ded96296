"""SPIFFE IDs and trust domain names: parse, compare, and nothing else.

Strict as go-spiffe, and in its words: nothing is normalised, so equal text is equal identity. Upper case, percent-encoding, ports and
user information are refused rather than folded (SPIFFE-ID §2). Knows nothing of certificates, tokens or bundles.
"""

import re
from dataclasses import dataclass, field
from typing import Final, Self

from typing_extensions import override

from broker.errors import InvalidSpiffeId, InvalidTrustDomain

SCHEME: Final = "spiffe://"
MAX_TRUST_DOMAIN: Final = 255
"""Longest trust domain name, in bytes (SPIFFE-ID §2.3)."""
MAX_SPIFFE_ID: Final = 2048
"""Longest SPIFFE ID, in bytes: what every implementation must support (SPIFFE-ID §2.3), and no more."""

_NAME: Final = re.compile(r"[a-z0-9._-]+")
_SEGMENT: Final = re.compile(r"[a-zA-Z0-9._-]+")


@dataclass(frozen=True, slots=True, order=True, repr=False)
class TrustDomain:
    """A trust domain name. Takes ``example.org`` or a SPIFFE ID in it; raises InvalidTrustDomain (SPIFFE-ID §2.1)."""

    name: str

    def __post_init__(self) -> None:
        name = _text_of(self.name, InvalidTrustDomain)
        if ":/" in name:
            # As in the reference libraries, a full ID stands for its trust domain; the whole of it must be valid.
            try:
                name = SpiffeId(name).trust_domain.name
            except InvalidSpiffeId as error:
                raise InvalidTrustDomain(error.message, code=error.reason, hint=error.hint) from None
        else:
            _check_name(name)
        object.__setattr__(self, "name", name)

    @override
    def __str__(self) -> str:
        return self.name

    @override
    def __repr__(self) -> str:
        return f"TrustDomain({self.name!r})"

    @property
    def id(self) -> "SpiffeId":
        """The SPIFFE ID of the trust domain itself, which has no path."""
        return SpiffeId(SCHEME + self.name)


@dataclass(frozen=True, slots=True, order=True, repr=False)
class SpiffeId:
    """A SPIFFE ID such as ``spiffe://example.org/web``. Raises InvalidSpiffeId (SPIFFE-ID §2)."""

    _text: str
    trust_domain: TrustDomain = field(init=False, compare=False)

    def __post_init__(self) -> None:
        text = _text_of(self._text, InvalidSpiffeId)
        if len(text) > MAX_SPIFFE_ID:
            raise InvalidSpiffeId(f"the SPIFFE ID is longer than {MAX_SPIFFE_ID} bytes", code="spiffe_id_too_long")
        if not text:
            raise InvalidSpiffeId("cannot be empty", code="spiffe_id_wrong_scheme")
        if not text.startswith(SCHEME):
            raise InvalidSpiffeId(
                "scheme is missing or invalid",
                code="spiffe_id_wrong_scheme",
                hint="a SPIFFE ID starts with spiffe://, in lower case",
            )
        name, slash, rest = text[len(SCHEME) :].partition("/")
        _check_name(name)
        if slash:
            _check_path(rest)
        object.__setattr__(self, "_text", text)
        object.__setattr__(self, "trust_domain", _checked_domain(name))

    @classmethod
    def of(cls, trust_domain: TrustDomain, path: str) -> Self:
        """Join a trust domain and a path, which is empty or starts with a slash; raises InvalidSpiffeId."""
        if path and not path.startswith("/"):
            # Without this, "example.org" and ".evil" would make another trust domain.
            raise InvalidSpiffeId("path must have a leading slash", code="spiffe_id_path_no_slash")
        return cls(SCHEME + trust_domain.name + path)

    @override
    def __str__(self) -> str:
        return self._text

    @override
    def __repr__(self) -> str:
        return f"SpiffeId({self._text!r})"

    @property
    def path(self) -> str:
        """The path: empty for the trust domain itself, else ``/a/b``."""
        return self._text[len(SCHEME) + len(self.trust_domain.name) :]

    def is_member_of(self, trust_domain: TrustDomain) -> bool:
        """Tell whether the ID lies in this trust domain; names are compared byte by byte."""
        return self.trust_domain.name == trust_domain.name

    def is_under(self, prefix: "SpiffeId") -> bool:
        """Tell whether the ID is the prefix or lies below it, at a segment boundary: /a covers /a/b, not /ab."""
        above = str(prefix)
        return self._text == above or self._text.startswith(above + "/")


def _text_of(value: object, error: type[InvalidSpiffeId]) -> str:
    # Edges hand over what JSON held; anything but text is refused, not converted.
    if not isinstance(value, str):
        raise error("it is not text")
    return str(value)


def _checked_domain(name: str) -> TrustDomain:
    domain = object.__new__(TrustDomain)
    object.__setattr__(domain, "name", name)
    return domain


def _check_name(name: str) -> None:
    if not name:
        raise InvalidTrustDomain("trust domain is missing", code="trust_domain_missing")
    if len(name) > MAX_TRUST_DOMAIN:
        raise InvalidTrustDomain(
            f"the trust domain is longer than {MAX_TRUST_DOMAIN} bytes", code="trust_domain_too_long"
        )
    if _NAME.fullmatch(name) is None:
        raise InvalidTrustDomain(
            "trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores",
            code="trust_domain_bad_character",
            hint="no port, user, upper case or percent-encoding",
        )


def _check_path(path: str) -> None:
    if not path or path.endswith("/"):
        raise InvalidSpiffeId("path cannot have a trailing slash", code="spiffe_id_trailing_slash")
    for segment in path.split("/"):
        if not segment:
            raise InvalidSpiffeId("path cannot contain empty segments", code="spiffe_id_empty_segment")
        if segment in (".", ".."):
            raise InvalidSpiffeId("path cannot contain dot segments", code="spiffe_id_dot_segment")
        if _SEGMENT.fullmatch(segment) is None:
            raise InvalidSpiffeId(
                "path segment characters are limited to letters, numbers, dots, dashes, and underscores",
                code="spiffe_id_bad_character",
                hint="no query, fragment or percent-encoding",
            )
