"""An entry's members as plain values, by SPIRE's names, and its messages. Knows no option and no file."""

from collections.abc import Mapping
from typing import Any, Final

from broker.cli.output import moment
from broker.errors import Invalid

Values = Mapping[str, Any]
"""Name to value; times and lives in seconds, 0 for none; sets as sorted lists."""

DEFAULTS: Final[Values] = {
    "selectors": [],
    "x509_svid_ttl": 0,
    "jwt_svid_ttl": 0,
    "federates_with": [],
    "admin": False,
    "downstream": False,
    "expires_at": 0,
    "dns_names": [],
    "store_svid": False,
    "hint": "",
    "disable_x509_svid_prefetch": False,
    "jwt_svid_include_jti": False,
    "allowed_audiences": [],
    "may_start_tasks": False,
    "description": "",
    "owner": "",
}
"""What an entry says where nothing is said."""
ATTRIBUTES: Final = ("disable_x509_svid_prefetch", "jwt_svid_include_jti")
OURS: Final = ("allowed_audiences", "may_start_tasks", "description", "owner")


def message(values: Values) -> Any:
    """Write ``broker.server.v1.RegisteredEntry``; members that are absent stay unset. Raises Invalid."""
    from broker._proto.broker.server.v1 import entries_pb2  # noqa: PLC0415 - imports protobuf
    from broker._proto.spire.api.types import entry_pb2, selector_pb2  # noqa: PLC0415
    from broker.client.calls import spiffe_id_message  # noqa: PLC0415
    from broker.spiffe import Selector, SpiffeId  # noqa: PLC0415

    entry = entry_pb2.Entry(id=values.get("id") or "")
    for name in ("spiffe_id", "parent_id"):
        if values.get(name):
            getattr(entry, name).CopyFrom(spiffe_id_message(SpiffeId(values[name])))
    for text in values.get("selectors", ()):
        one = Selector(text)
        entry.selectors.append(selector_pb2.Selector(type=one.type, value=one.value))
    for name in ("federates_with", "dns_names"):
        getattr(entry, name).extend(values.get(name, ()))
    for name in ATTRIBUTES:
        if values.get(name):
            setattr(entry.additional_attributes, name, True)
    plain = ("x509_svid_ttl", "jwt_svid_ttl", "admin", "downstream", "expires_at", "store_svid", "hint")
    try:
        for name in plain:
            if values.get(name):
                setattr(entry, name, values[name])
        ours = {name: values[name] for name in OURS if values.get(name)}
        return entries_pb2.RegisteredEntry(entry=entry, **ours)
    except ValueError as error:
        raise Invalid(f"the entry is not valid: {error}", code="invalid_entry") from None


def values_of(registered: Any) -> dict[str, Any]:
    """Read such a message: all members, and those that only a server makes."""
    from broker.client.calls import spiffe_id_text  # noqa: PLC0415 - imports gRPC

    entry = registered.entry
    return {
        "id": entry.id,
        "spiffe_id": spiffe_id_text(entry.spiffe_id),
        "parent_id": spiffe_id_text(entry.parent_id),
        "selectors": [f"{one.type}:{one.value}" for one in entry.selectors],
        "x509_svid_ttl": entry.x509_svid_ttl,
        "jwt_svid_ttl": entry.jwt_svid_ttl,
        "federates_with": list(entry.federates_with),
        "admin": entry.admin,
        "downstream": entry.downstream,
        "expires_at": entry.expires_at,
        "dns_names": list(entry.dns_names),
        "revision_number": entry.revision_number,
        "store_svid": entry.store_svid,
        "hint": entry.hint,
        "created_at": entry.created_at,
        "allowed_audiences": list(registered.allowed_audiences),
        "may_start_tasks": registered.may_start_tasks,
        "description": registered.description,
        "owner": registered.owner,
        **{name: getattr(entry.additional_attributes, name) for name in ATTRIBUTES},
    }


def row(registered: Any) -> dict[str, Any]:
    """Give an entry's members for an answer, by SPIRE's names; rare attributes only where one is set."""
    values = values_of(registered)
    attributes = {name: values.pop(name) for name in ATTRIBUTES}
    shown = {**values, "expires_at": moment(values["expires_at"]), "created_at": moment(values["created_at"])}
    return {**shown, "additional_attributes": attributes} if any(attributes.values()) else shown


def mask(names: set[str]) -> Any:
    """Write ``broker.server.v1.RegisteredEntryMask`` for these members."""
    from broker._proto.broker.server.v1 import entries_pb2  # noqa: PLC0415 - imports protobuf

    wanted = entries_pb2.RegisteredEntryMask()
    for name in names:
        if name in OURS:
            setattr(wanted, name, True)
        else:
            setattr(wanted.entry, "additional_attributes" if name in ATTRIBUTES else name, True)
    return wanted
