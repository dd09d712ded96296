"""Which node agents a verb is of: the filters of the server, as options."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import click

from broker.cli.entry_filters import MATCHES
from broker.cli.options import SELECTOR, option

F = TypeVar("F", bound=Callable[..., Any])


def options(command: F) -> F:
    """Add the options of a filter."""
    for add in reversed(
        (
            option("--attestation-type", spire=["attestationType"], help="Only those attested so: join_token, tpm …"),
            option("--banned", spire=["banned"], type=bool, help="true: only banned ones; false: only others."),
            option("--can-reattest", spire=["canReattest"], type=bool, help="true: those that can; false: those not."),
            option(
                "--expires-before", spire=["expiresBefore"], metavar="TIME",
                help="Only those whose SVID ends before: 2026-01-31T12:00:00Z.",
            ),
            option(
                "--selector", "selectors", spire=["selector"], type=SELECTOR, multiple=True,
                help="Only nodes that have it. Repeatable.",
            ),
            option(
                "--match-selectors", spire=["matchSelectorsOn"], type=click.Choice(MATCHES), default="superset",
                help="How the node's selectors compare with those given. Default: superset.",
            ),
        )
    ):  # fmt: skip
        command = add(command)
    return command


def message(kind: str, given: Mapping[str, Any]) -> Any:
    """Write the ``Filter`` of ``ListAgentsRequest`` or ``CountAgentsRequest`` (``spire.api.server.agent.v1``)."""
    from broker._proto.spire.api.server.agent.v1 import agent_pb2  # noqa: PLC0415 - imports protobuf
    from broker.spiffe import Selector  # noqa: PLC0415

    wanted = getattr(agent_pb2, kind).Filter(
        by_attestation_type=given.get("attestation_type") or "", by_expires_before=_wire_time(given["expires_before"])
    )
    for name in ("banned", "can_reattest"):
        if given[name] is not None:
            getattr(wanted, f"by_{name}").value = given[name]  # false is a filter, too
    for text in given["selectors"]:
        one = Selector(text)
        wanted.by_selector_match.selectors.add(type=one.type, value=one.value)
    if given["selectors"]:
        wanted.by_selector_match.match = cast("Any", MATCHES.index(given["match_selectors"]))
    return wanted


def _wire_time(text: str | None) -> str:
    """Write a time as SPIRE's servers read it; one that is written so already is left to them."""
    if not text:
        return ""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return text
    if at.tzinfo is None:
        raise click.UsageError(
            f"{text} has no time zone: write 2026-01-31T12:00:00Z", click.get_current_context(silent=True)
        )
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S +0000 +00")
