"""Which entries a verb is of: the filters of the server, as options."""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar, cast

import click

from broker.cli.options import SELECTOR, SPIFFE_ID, option

F = TypeVar("F", bound=Callable[..., Any])

MATCHES: Final = ("exact", "subset", "superset", "any")
"""How the entry's set is compared with the one given, in the order of the wire's numbers."""
_HOW: Final = click.Choice(MATCHES)


def options(command: F) -> F:
    """Add the options of a filter."""
    for add in reversed(
        (
            option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, help="Only this identity."),
            option("--parent-id", spire=["parentID"], type=SPIFFE_ID, help="Only below this parent."),
            option(
                "--selector", "selectors", spire=["selector"], type=SELECTOR, multiple=True,
                help="Only entries that ask for it. Repeatable.",
            ),
            option(
                "--match-selectors", spire=["matchSelectorsOn"], type=_HOW, default="superset",
                help="How its selectors compare with those given. Default: superset.",
            ),
            option("--federates-with", spire=["federatesWith"], multiple=True, help="Only with this trust domain."),
            option(
                "--match-federates-with", spire=["matchFederatesWithOn"], type=_HOW, default="superset",
                help="How its trust domains compare with those given. Default: superset.",
            ),
            option("--hint", spire=["hint"], default="", help="Only with this hint."),
            option("--downstream", spire=["downstream"], is_flag=True, help="Only of servers below this one."),
            option("--owner", help="Only of this owner; an empty one: of nobody."),
        )
    ):  # fmt: skip
        command = add(command)
    return command


def message(given: Mapping[str, Any]) -> Any:
    """Write ``broker.server.v1.EntryFilter``."""
    from broker._proto.broker.server.v1 import entries_pb2  # noqa: PLC0415 - imports protobuf
    from broker.client.calls import spiffe_id_message  # noqa: PLC0415
    from broker.spiffe import Selector, SpiffeId  # noqa: PLC0415

    wanted = entries_pb2.EntryFilter(owner=given["owner"])
    for name in ("spiffe_id", "parent_id"):
        if given[name]:
            getattr(wanted.entry, f"by_{name}").CopyFrom(spiffe_id_message(SpiffeId(given[name])))
    for text in given["selectors"]:
        one = Selector(text)
        wanted.entry.by_selectors.selectors.add(type=one.type, value=one.value)
    if given["selectors"]:
        wanted.entry.by_selectors.match = cast("Any", MATCHES.index(given["match_selectors"]))
    if given["federates_with"]:
        wanted.entry.by_federates_with.trust_domains.extend(given["federates_with"])
        wanted.entry.by_federates_with.match = cast("Any", MATCHES.index(given["match_federates_with"]))
    if given["hint"]:
        wanted.entry.by_hint.value = given["hint"]
    if given["downstream"]:
        wanted.entry.by_downstream.value = True
    return wanted
