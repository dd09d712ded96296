"""The audit log's records: one thing that happened, and its one canonical form.

Chaining is in :mod:`broker.audit.chain`, keeping is the store's. A record never holds a secret: names are declared per event
(:mod:`broker.audit.events`), and of text that looks like a token or a private key only the hash is kept. Nobody can keep a
refusal out of the log by the text that he sends.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final, Self, TypeAlias

from broker.audit.events import FIELDS, Event
from broker.errors import Invalid, InvalidJson
from broker.spiffe import strictjson
from broker.spiffe.jose import b64url_encode
from broker.spiffe.strictjson import MAX_EXACT, JsonValue

FieldValue: TypeAlias = str | int | bool | list[str] | tuple[str, ...] | None

VERSION: Final = 1
"""The form of a record's body; another form gets another number, and old rows stay as they are."""
MAX_TEXT: Final = 8192
"""Longest text kept as it is, in characters: a canonical authority, or a selector with a path, must fit."""
MAX_ITEMS: Final = 256
"""Most texts in one list: an entry's selectors must fit."""

# A compact JWS or JWE starts with a JSON object's first two characters in base64url. It is looked for at the start of a
# word only, which keeps the search linear. Lone surrogates are not text.
_UNFIT: Final = re.compile(
    "(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{5,}\\.[A-Za-z0-9_-]*\\.[A-Za-z0-9_-]*|-----BEGIN [A-Z ]*PRIVATE KEY|[\ud800-\udfff]"
)
_TOKEN_SIGN: Final = "eyJ"  # noqa: S105  # how every JWS begins
_KEY_SIGN: Final = "-----BEGIN"
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")


@dataclass(frozen=True, slots=True)
class Record:
    """One thing that happened: who did it (``actor``), to what (``subject``), when (aware). Raises Invalid.

    Fields have declared names; lists are kept as tuples. Of a secret or an overlong text only the hash is kept. No two
    records that differ have the same body.
    """

    event: Event
    at: datetime
    actor: str
    subject: str
    fields: Mapping[str, FieldValue]

    def __post_init__(self) -> None:
        event = Event(self.event)
        if self.at.tzinfo is None:
            raise _invalid("its time has no time zone")
        if not self.actor or not self.subject:
            raise _invalid("its actor or subject is empty")
        unknown = self.fields.keys() - FIELDS[event]
        if unknown:
            raise _invalid(f"{event} has no field {min(unknown)}")
        # All texts at once, for most records hold nothing to withhold: a search in each would be a third of the work.
        is_plain = _is_plain([self.actor, self.subject, *(one for one in self.fields.values() if type(one) is str)])
        fields = {
            name: value if value is None or (is_plain and type(value) is str) else _read(value)
            for name, value in self.fields.items()
        }
        object.__setattr__(self, "event", event)
        object.__setattr__(self, "at", self.at.astimezone(UTC))
        if not is_plain:
            object.__setattr__(self, "actor", _shown(self.actor))
            object.__setattr__(self, "subject", _shown(self.subject))
        object.__setattr__(self, "fields", MappingProxyType(fields))

    def body(self) -> bytes:
        """Give the one canonical form (RFC 8785); times in UTC with microseconds."""
        # Every part was judged when the record was made, and all names are ours.
        return strictjson.canonical_of_known(
            {
                "v": VERSION,
                "event": self.event.value,
                "at": self.at.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z",
                "actor": self.actor,
                "subject": self.subject,
                "fields": dict(self.fields),
            }
        )

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Read a body; one that :meth:`body` would not write is Invalid."""
        try:
            value = strictjson.loads(body)
        except InvalidJson:
            raise _invalid("its body is not JSON") from None
        if not isinstance(value, dict) or value.keys() != {"v", "event", "at", "actor", "subject", "fields"}:
            raise _invalid("its body does not have exactly its members")
        if value["v"] != VERSION or isinstance(value["v"], bool):
            raise _invalid("its body has a form that is not known")
        fields = value["fields"]
        if not isinstance(fields, dict):
            raise _invalid("its fields are not an object")
        record = cls(
            _event(value["event"]),
            _time(value["at"]),
            _text(value["actor"]),
            _text(value["subject"]),
            {name: _field(item) for name, item in fields.items()},
        )
        if record.body() != body:
            raise _invalid("its body is not in canonical form")
        return record


def _is_plain(texts: list[str]) -> bool:
    """Tell whether nothing in any of the texts can be unfit: what is, has one of these signs in it or is not ASCII."""
    try:
        joined = "\n".join(texts)
    except TypeError:  # one of them is no text: refused where it is read
        return False
    return len(joined) <= MAX_TEXT and joined.isascii() and _TOKEN_SIGN not in joined and _KEY_SIGN not in joined


def _read(value: FieldValue) -> FieldValue:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _shown(value)
    if isinstance(value, int):
        if abs(value) > MAX_EXACT:
            raise _invalid("a number is beyond 2^53; write it as text")
        return value
    if not isinstance(value, (list, tuple)):
        raise _invalid(f"a {type(value).__name__} cannot be recorded")
    if len(value) > MAX_ITEMS:
        raise _invalid(f"a list holds more than {MAX_ITEMS} texts")
    return tuple(_shown(item) for item in value)


def _shown(text: object) -> str:
    if not isinstance(text, str):
        raise _invalid("something is not text")
    # NOTE(security): the last line of defence; callers record hashes. Refusing instead would let whoever sends such a
    # text be refused without a record.
    if len(text) <= MAX_TEXT and _UNFIT.search(text) is None:
        return text
    hashed = b64url_encode(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return f"withheld sha-256:{hashed} ({len(text)} characters)"


def _event(value: JsonValue) -> Event:
    try:
        return Event(_text(value))
    except ValueError:
        raise _invalid("its event is not known") from None


def _time(value: JsonValue) -> datetime:
    text = _text(value)
    if _TIME.fullmatch(text) is None:
        raise _invalid("its time is malformed")
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise _invalid("its time is malformed") from None


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise _invalid("something is not text")
    return value


def _field(value: JsonValue) -> FieldValue:
    if isinstance(value, list):
        return [_text(item) for item in value]
    if isinstance(value, (dict, float)):
        raise _invalid("a field is an object or a fraction")
    return value


def _invalid(what: str) -> Invalid:
    return Invalid(f"the audit record is not valid: {what}", code="invalid_record")
