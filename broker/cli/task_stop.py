"""``broker task revoke --user|--agent|--audience``: the operators' kill switch."""

from collections.abc import Mapping

from broker.cli.delegation import STOPPED
from broker.cli.options import Settings

_WORDS = {
    "user": "all that the user {} gave until now",
    "agent": "all that the agent {} does now",
    "audience": "every token and task for the service {}",
}


def stop(here: Settings, named: Mapping[str, str], reason: str) -> None:
    """Stop what is named, once it is confirmed, and say how many tasks ended."""
    ((kind, name),) = named.items()
    what = _WORDS[kind].format(name)
    here.confirm(f"End {what}?")
    if here.dry_run:
        here.shown.talk(f"would end {what} (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Stops  # noqa: PLC0415

    done = with_server(here, lambda channel: Stops(channel, timeout=here.timeout).stop(**named, reason=reason))
    here.shown.one(STOPPED, {"kind": kind, "name": name, "tasks_ended": done.tasks_ended})
    if kind == "user":
        here.shown.next(f"broker delegation revoke --user {name} keeps them from giving anything anew")
