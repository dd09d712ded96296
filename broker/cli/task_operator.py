"""The verbs of ``broker task`` by which operators see, stop and end other people's tasks, at the server."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import click

from broker.cli.options import SPIFFE_ID, Settings, Verb, option, settings
from broker.cli.output import Format
from broker.cli.task_rows import ONE, SHAPE, STATES, TREE, full_row, revocation, row
from broker.cli.task_tree import branch_of, lines

_TASK: Final = click.argument("task_id", metavar="ID")
_REASON: Final = option("--reason", default="", help="For the record.")
_VERSION: Final = option(
    "--expected-version", type=click.IntRange(min=1), default=None, help="Only while it has this version (task show)."
)
_KEY: Final = option(
    "--idempotency-key",
    default="",
    metavar="KEY",
    help="Sent again with the same key, it is answered as the first time.",
)


@click.command("list", cls=Verb)
@option("--state", type=click.Choice(("live", *STATES)), default=None, help="Only tasks in this state.")
@option("--user", default="", help="Only tasks for this user.")
@option("--agent", type=SPIFFE_ID, help="Only tasks of this SPIFFE ID.")
@option("--root", default="", metavar="ID", help="Only tasks of the tree that begins with this one.")
@option("--parent", default="", metavar="ID", help="Only tasks directly below this one.")
def list_(state: str | None, agent: str | None, **named: str) -> None:
    """List tasks, as an operator; each with its own state: broker task tree also asks those above it."""
    here = settings()
    found = _ask(here, lambda tasks: tasks.list(state=state or "", agent=agent or "", told=_reading(here), **named))
    here.shown.progress("")
    here.shown.many(SHAPE, [row(one) for one in found])
    here.shown.next("broker task show ID" if found else "broker task start --help")


@click.command("show", cls=Verb)
@_TASK
def show(task_id: str) -> None:
    """Show one task, as an operator: also whom it acts for, what was started below it, and how far its end has come."""
    here = settings()
    found = _ask(here, lambda tasks: tasks.get(task_id))
    here.shown.one(ONE, full_row(found), full=True)
    if found.children:
        here.shown.next(f"broker task tree {task_id}")
    elif found.state in {"active", "suspended"}:
        here.shown.next(f"broker task {'revoke' if found.state == 'active' else 'resume'} {task_id}")


@click.command("tree", cls=Verb)
@_TASK
@option("--below", is_flag=True, help="Only the task itself and what is below it, not the whole tree it belongs to.")
@option("--live", is_flag=True, help="Leave out what is over.")
def tree(task_id: str, *, below: bool, live: bool) -> None:
    """Show the tree of tasks that a task belongs to, as an operator: who started whom, and what still lives."""
    here = settings()

    async def act(tasks: Any) -> Any:
        found = await tasks.get(task_id)
        return found.root, await tasks.list(root=found.root, told=_reading(here))

    root, found = _ask(here, act)
    here.shown.progress("")
    drawn = here.shown.format in {None, Format.TABLE, Format.WIDE}
    shown = []
    for branch, prefix in lines(branch_of(found, task_id if below else root), live=live):
        members = row(branch.task) | {"state": branch.state}
        shown.append(members | {"tree": prefix + branch.task.id} if drawn else members)
    here.shown.many(TREE, shown)
    here.shown.next(f"broker task revoke {root} ends the whole tree" if shown else f"broker task show {task_id}")


@click.command("suspend", cls=Verb)
@_TASK
@_REASON
@_VERSION
@_KEY
def suspend(task_id: str, **asked: Any) -> None:
    """Stop a task and all below it for a while, as an operator. Every token dies; only an operator lets it go on."""
    _change("suspend", task_id, asked)


@click.command("resume", cls=Verb)
@_TASK
@_REASON
@_VERSION
@_KEY
def resume(task_id: str, **asked: Any) -> None:
    """Let a suspended task go on, as an operator. Its tokens are asked for anew: none comes back."""
    _change("resume", task_id, asked)


@click.command("handoff", cls=Verb)
@_TASK
@option("--to", spire=["spiffeID"], type=SPIFFE_ID, required=True, help="SPIFFE ID of the workload that takes over.")
@_REASON
@_VERSION
@_KEY
def hand_off(task_id: str, **asked: Any) -> None:
    """Give a task to another workload, as an operator: it ends with all below it, and a successor waits for that workload."""
    _change("handoff", task_id, asked)


@click.command("revoke", cls=Verb)
@click.argument("task_id", metavar="[ID]", required=False)
@option("--user", default="", help="Instead: all that this user gave until now; they may sign in and give anew.")
@option("--agent", type=SPIFFE_ID, help="Instead: all that this SPIFFE ID does now.")
@option("--audience", default="", metavar="URI", help="Instead: every token for this service, and every task there.")
@_REASON
@_VERSION
@_KEY
def revoke(task_id: str | None, user: str, agent: str | None, audience: str, **asked: Any) -> None:
    """End a task and all below it at once, as an operator; or all of a user, an agent or a service."""
    wanted = {"user": user, "agent": agent or "", "audience": audience}
    named = {name: value for name, value in wanted.items() if value}
    if len(named) + bool(task_id) != 1:
        raise click.UsageError("name one task, or one of --user, --agent, --audience")
    if task_id:
        _change("revoke", task_id, asked)
        return
    if asked["expected_version"] or asked["idempotency_key"]:
        raise click.UsageError("--expected-version and --idempotency-key go with one task")
    from broker.cli.task_stop import stop  # noqa: PLC0415 - rarely needed

    stop(settings(), named, asked["reason"])


VERBS: Final = (list_, show, tree, suspend, resume, hand_off, revoke)

_LOST: Final = {
    "revoke": "End the task {} and all below it?",
    "handoff": "End the task {} and all below it, and give its work to {}?",
}
"""What a person is asked where something ends for good."""


def _change(operation: str, task_id: str, asked: dict[str, Any]) -> None:
    here, to = settings(), asked.get("to") or ""
    if operation in _LOST:
        here.confirm(_LOST[operation].format(task_id, to))
    if here.dry_run:
        wanted = {name: value for name, value in asked.items() if value}
        here.shown.one(SHAPE, {"id": task_id, "operation": operation, **wanted})
        here.shown.talk("nothing was sent (--dry-run)")
        return
    sent = asked | {"expected_version": asked["expected_version"] or 0}
    changed = _ask(here, lambda tasks: tasks.change(task_id, operation, **sent))
    task = changed.task
    successor = row(changed.successor) if changed.HasField("successor") else None
    more = {} if successor is None else {"successor": successor}
    here.shown.one(SHAPE, row(task) | {"revocation": revocation(task)} | more)
    if successor is not None:
        here.shown.talk(f"its successor {successor['id']} waits for {successor['agent']}")
    here.shown.next(_following(task, successor))


def _following(task: Any, successor: dict[str, Any] | None) -> str:
    if successor is not None:
        return f"broker task show {successor['id']}"
    return f"broker task {'resume' if task.state == 'suspended' else 'show'} {task.id}"


def _reading(here: Settings) -> Callable[[int], None]:
    """Say on a terminal how far a long list has come."""
    return lambda count: here.shown.progress(f"{count} tasks read")


def _ask(here: Settings, act: Callable[[Any], Awaitable[Any]]) -> Any:
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Tasks  # noqa: PLC0415

    return with_server(here, lambda channel: act(Tasks(channel, timeout=here.timeout)))
