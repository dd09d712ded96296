"""The short texts that tasks and tokens carry: ids, users, sessions, hashes. Each has one check, made where it enters."""

import re
from typing import Final

from broker.errors import Invalid

MAX_ID: Final = 128
"""Longest id that we make ourselves, in characters: a prefix and 128 random bits need some thirty."""
MAX_NAME: Final = 255
"""Longest name that others make (users, sessions, clients), in characters: OpenID Connect Core §2 limits ``sub`` so."""
MAX_PURPOSE: Final = 1024
"""Longest purpose, in characters: a sentence, kept in our records; a token holds its hash only."""
MAX_URL: Final = 2048
"""Longest issuer, in characters."""

ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
NAME: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")
DIGEST: Final = re.compile(r"sha-256:[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")
# 32 bytes in 43 characters leave two spare bits, which are zero: one hash has one text.
SERIAL_NUMBER: Final = re.compile("[0-9a-f]{0,40}")
"""A certificate's serial number in lower hex, up to twenty octets; empty: not told."""
THUMBPRINT: Final = re.compile(r"[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")
_ISSUER: Final = re.compile(r"https://[\x21-\x7e]{1,2040}")
_PURPOSE: Final = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,1024}")


def check_id(text: str, what: str) -> None:
    """Refuse what is not an id of our own making; raises Invalid."""
    if ID.fullmatch(text) is None:
        raise Invalid(f"the {what} is not 1 to {MAX_ID} letters, digits, dashes or underscores")


def check_name(text: str, what: str) -> None:
    """Refuse what is not printable ASCII, or is too long; raises Invalid."""
    if NAME.fullmatch(text) is None:
        raise Invalid(f"the {what} is not 1 to {MAX_NAME} printable ASCII characters")


def check_issuer(text: str, what: str) -> None:
    """Refuse what is not an https URL; raises Invalid. Issuers are compared byte by byte (RFC 8414 §3.3)."""
    if len(text) > MAX_URL or _ISSUER.fullmatch(text) is None:
        raise Invalid(f"the {what} is not an https URL of at most {MAX_URL} characters")


def check_digest(text: str, what: str) -> None:
    """Refuse what is not ``sha-256:`` and 43 characters of base64url; raises Invalid."""
    if DIGEST.fullmatch(text) is None:
        raise Invalid(f"the {what} is not sha-256: and a hash in base64url")


def check_purpose(text: str) -> None:
    """Refuse an empty or overlong purpose, and control characters; raises Invalid."""
    if not text.strip() or _PURPOSE.fullmatch(text) is None:
        raise Invalid(
            f"the purpose is not 1 to {MAX_PURPOSE} characters of text", hint="say in a sentence what the task is for"
        )
