"""Files of entries: ours (what ``export`` and ``list -o yaml`` write) and SPIRE's (``entry create -data``, ``show -output json``).

A name that is not known is refused: a misspelt restriction must not pass for a set one.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from broker.cli.entry_values import ATTRIBUTES, DEFAULTS, Values
from broker.cli.inputs import read_file
from broker.cli.options import DURATION
from broker.cli.output import timestamp
from broker.cli.yaml import to_yaml
from broker.errors import Invalid
from broker.spiffe.strictyaml import NotYaml, read_yaml

MAX_BYTES: Final = 128 << 20
"""A hundred thousand entries have some 50 MiB."""
KIND: Final = "entries"
_IGNORED: Final = frozenset({"kind", "revision_number", "created_at"})  # the server's to say
_OTHER_NAMES: Final[Mapping[str, str]] = {"entry_id": "id", "entry_expiry": "expires_at"}
_LISTS: Final = frozenset(name for name, value in DEFAULTS.items() if isinstance(value, list))
_FLAGS: Final = frozenset(name for name, value in DEFAULTS.items() if isinstance(value, bool))
_CAPITAL: Final = re.compile(r"(?<=[a-z0-9])[A-Z]")


@dataclass(frozen=True, slots=True)
class EntryFile:
    """What a file says: whose the entries are (empty: it does not say), and each with the members that it names."""

    owner: str
    entries: Sequence[Values]


def read_entries(name: str) -> EntryFile:
    """Read a file, ``-`` being standard input; raises Invalid with the place of what is wrong."""
    text = read_file(name, "the file of entries", limit=MAX_BYTES)
    value = _json(text) if text.startswith(("{", "[")) else _yaml(text)
    owner = ""
    if isinstance(value, dict) and not {"spiffe_id", "spiffeId"} & value.keys():
        owner = _text(value.pop("owner", ""), "owner")
        value.pop("kind", None)
        value.pop("next_page_token", None)
        if set(value) not in ({"items"}, {"entries"}):
            raise _wrong("it holds no list named entries or items")
        (value,) = value.values()
    items = value if isinstance(value, list) else [value]
    return EntryFile(owner, [_entry(item, f"entry {number}") for number, item in enumerate(items, 1)])


def write_entries(entries: Iterable[Values], owner: str = "") -> str:
    """Write the file, without what the server alone says and without what is the default."""
    items = [_shown(entry) for entry in entries]
    head = {"kind": KIND, **({"owner": owner} if owner else {})}
    return to_yaml({**head, "items": items})


def _shown(entry: Values) -> dict[str, Any]:
    shown = {name: value for name, value in entry.items() if name not in DEFAULTS or value != DEFAULTS[name]}
    if "expires_at" in shown:
        shown["expires_at"] = timestamp(datetime.fromtimestamp(shown["expires_at"], UTC))
    return {name: value for name, value in shown.items() if name not in _IGNORED}


def _entry(item: object, where: str) -> Values:
    if not isinstance(item, dict):
        raise _wrong(f"{where} is no entry")
    found: dict[str, Any] = {}
    for given, value in item.items():
        name = _name(given)
        if name in _IGNORED or value is None:
            continue
        if name == "additional_attributes":
            found |= _attributes(value, where)
        elif name in found:
            raise _wrong(f"{where} says {name} twice")
        elif name in {"id", "spiffe_id", "parent_id"} or name in DEFAULTS:
            found[name] = _value(name, value, f"{where}, {given}")
        else:
            raise _wrong(f"{where} has an unknown member {given!r}", hint="broker entry export shows the names")
    for name in ("spiffe_id", "parent_id", "selectors"):
        if not found.get(name):
            raise _wrong(f"{where} has no {name}")
    return found


def _name(given: str) -> str:
    name = _CAPITAL.sub(lambda match: f"_{match[0]}", given).lower()
    return _OTHER_NAMES.get(name, name)


def _attributes(value: object, where: str) -> Values:
    if not isinstance(value, dict):
        raise _wrong(f"{where}: its additional_attributes are no object")
    found = {_name(name): flag for name, flag in value.items()}
    if not found.keys() <= set(ATTRIBUTES):
        raise _wrong(f"{where} has unknown additional_attributes")
    return {name: _flag(flag, f"{where}, {name}") for name, flag in found.items()}


def _value(name: str, value: object, where: str) -> Any:
    if name in {"spiffe_id", "parent_id"}:
        return _spiffe_id(value, where)
    if name in _LISTS:
        if not isinstance(value, list):
            raise _wrong(f"{where}: not a list")
        read: Callable[[object, str], str] = _selector if name == "selectors" else _text
        texts = [read(one, where) for one in value]
        # SPIRE's own files name trust domains by their SPIFFE ID.
        return [text.removeprefix("spiffe://") for text in texts] if name == "federates_with" else texts
    if name in _FLAGS:
        return _flag(value, where)
    if name in {"x509_svid_ttl", "jwt_svid_ttl"}:
        return _number(value, where, lambda text: DURATION.convert(text, None, None))
    if name == "expires_at":
        return _number(value, where, _moment)
    return _text(value, where)


def _number(value: object, where: str, read: Callable[[str], int]) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = _text(value, where)
    if re.fullmatch(r"[0-9]{1,18}", text):  # protobuf's JSON writes 64-bit numbers as text
        return int(text)
    try:
        return read(text)
    except Exception:  # noqa: BLE001 - click's own errors are of no help here
        raise _wrong(f"{where}: {text!r} is not a number of seconds, a duration or a time") from None


def _moment(text: str) -> int:
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(text)
    return int(at.timestamp())


def _spiffe_id(value: object, where: str) -> str:
    from broker.spiffe import SpiffeId, TrustDomain  # noqa: PLC0415 - imports cryptography

    try:
        if isinstance(value, dict):
            parts = {_name(name): part for name, part in value.items()}
            domain, path = _text(parts.get("trust_domain"), where), _text(parts.get("path", ""), where)
            return str(SpiffeId.of(TrustDomain(domain), path))
        return str(SpiffeId(_text(value, where)))
    except Invalid as error:
        raise _wrong(f"{where}: {error.message}", hint=error.hint) from None


def _selector(value: object, where: str) -> str:
    from broker.spiffe import Selector  # noqa: PLC0415 - as above

    try:
        if isinstance(value, dict):
            return str(Selector.of(_text(value.get("type"), where), _text(value.get("value"), where)))
        return str(Selector(_text(value, where)))
    except Invalid as error:
        raise _wrong(f"{where}: {error.message}", hint=error.hint) from None


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(f"{where}: not true or false")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(f"{where}: not a text")
    return value


def _json(text: str) -> Any:
    from broker.spiffe import strictjson  # noqa: PLC0415 - imports cryptography

    try:
        return strictjson.loads(text.encode(), max_bytes=MAX_BYTES)
    except Invalid as error:
        raise _wrong(error.message) from None


def _yaml(text: str) -> Any:
    try:
        return read_yaml(text)
    except NotYaml as error:
        raise _wrong(f"it is not YAML{error.place}") from None


def _wrong(what: str, hint: str = "") -> Invalid:
    return Invalid(f"the file of entries is not valid: {what}", code="invalid_entry_file", hint=hint)
