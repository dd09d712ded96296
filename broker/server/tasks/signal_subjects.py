"""Whom a security event is about: ``sub_id`` in the formats of RFC 9493 that name a user or a session of one issuer.

An issuer speaks of its own users only: a subject of another issuer is refused, not ignored. A format that names nobody here
(an address, a device) is refused too: whoever is meant must not go on unnoticed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from broker.errors import InvalidToken
from broker.spiffe.strictjson import JsonValue

_SHORT: Final = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True, slots=True)
class Named:
    """A user (the issuer's ``sub``) and a session (its ``sid``); what is not named is empty, but not both."""

    user: str = ""
    session: str = ""


def short(payload: Mapping[str, JsonValue], name: str) -> str | None:
    """Read a claim of short printable text, None where there is none; raises InvalidToken."""
    value = payload.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or _SHORT.fullmatch(value) is None:
        raise _invalid(f"its {name} is not short printable text")
    return value


def read_subject(sub_id: JsonValue, issuer: str) -> Named:
    """Read ``sub_id``: ``iss_sub``, ``opaque``, or a complex one of ``user`` and ``session``; raises InvalidToken."""
    if not isinstance(sub_id, dict):
        raise _invalid("it has no sub_id")
    form = sub_id.get("format")
    if form == "complex":
        return _complex(sub_id, issuer)
    return Named(user=_simple(sub_id, issuer))


def _complex(sub_id: Mapping[str, JsonValue], issuer: str) -> Named:
    user, session = sub_id.get("user"), sub_id.get("session")
    if not sub_id.keys() <= {"format", "user", "session"}:
        # SSF 1.0 §3.2: every part narrows. One that we cannot judge would make it reach further than was meant.
        raise _invalid("its sub_id has a part that is not known here")
    named = Named(
        user="" if user is None else _simple(user, issuer),
        session="" if session is None else _simple(session, issuer),
    )
    if not named.user and not named.session:
        raise _invalid("its sub_id names nobody")
    return named


def _simple(subject: JsonValue, issuer: str) -> str:
    if not isinstance(subject, dict):
        raise _invalid("a part of its sub_id is not an object")
    form = subject.get("format")
    members = {"iss_sub": {"format", "iss", "sub"}, "opaque": {"format", "id"}}.get(
        form if isinstance(form, str) else ""
    )
    if members is None or subject.keys() != members:
        raise _invalid("its sub_id has a format that names nobody here")
    if form == "iss_sub" and subject["iss"] != issuer:
        raise _invalid("its sub_id is of another issuer")
    name = short(subject, "sub" if form == "iss_sub" else "id")
    if name is None:
        raise _invalid("its sub_id names nobody")
    return name


def _invalid(why: str) -> InvalidToken:
    return InvalidToken(f"the signal is refused: {why}", code="signal_subject")
