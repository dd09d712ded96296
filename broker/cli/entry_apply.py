"""``broker entry apply|diff|export``: a server's entries by a file. The plan is made in :mod:`broker.cli.entry_plan`."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from broker.cli import entry_filters
from broker.cli.entry_plan import Action, Step, plan
from broker.cli.entry_values import Values
from broker.cli.options import Noun, Settings, option, settings
from broker.cli.output import EXIT_FAILED, EXIT_OK, Column, Shape

F = TypeVar("F", bound=Callable[..., Any])

SHAPE: Final = Shape(
    "entry_change",
    "entry_changes",
    (
        Column("action", "action"),
        Column("id", "id", wide=True),
        Column("spiffe id", "spiffe_id"),
        Column("parent", "parent_id", wide=True),
        Column("selectors", "selectors"),
        Column("changes", "changes"),
        Column("error", "error"),
    ),
    name="spiffe_id",
)


def add(noun: Noun) -> None:
    """Add the verbs."""
    noun.command("apply")(apply)
    noun.command("diff")(diff)
    noun.command("export")(export)


def _file(command: F) -> F:
    for one in reversed(
        (
            option("-f", "--file", spire=["data"], required=True, help="YAML or JSON, ours or SPIRE's; - is standard input."),
            option("--owner", default="", help="Whose these entries are, where the file does not say."),
            option("--prune", is_flag=True, help="Delete entries of this owner that the file does not have."),
            option("--take-over", is_flag=True, help="Take entries that belong to another owner."),
        )
    ):  # fmt: skip
        command = one(command)
    return command


@_file
def apply(file: str, owner: str, prune: bool, take_over: bool) -> int:
    """Make the server's entries those of a file. The same file again changes nothing."""
    here = settings()
    steps = _plan(here, file, owner, prune=prune, take_over=take_over)
    doing = [step for step in steps if step.action is not Action.UNCHANGED]
    deleting = sum(step.action is Action.DELETE for step in doing)
    if here.dry_run:
        here.shown.many(SHAPE, [_row(step) for step in doing])
        here.shown.talk(f"{_summary(steps)}; nothing was sent (--dry-run)")
        return EXIT_OK
    if deleting:
        here.confirm(f"Delete {deleting} entries? Their identities are withdrawn at once.")
    return _carry_out(here, steps, doing)


@_file
def diff(file: str, owner: str, prune: bool, take_over: bool) -> int:
    """Show what apply would do. Exit code 1: there is a difference."""
    here = settings()
    steps = _plan(here, file, owner, prune=prune, take_over=take_over)
    doing = [step for step in steps if step.action is not Action.UNCHANGED]
    if doing or here.shown.format is not None:
        here.shown.many(SHAPE, [_row(step) for step in doing])
    here.shown.talk(_summary(steps))
    return EXIT_FAILED if doing else EXIT_OK


@entry_filters.options
def export(**given: Any) -> None:
    """Write the entries as a file that apply takes."""
    from broker.cli.entry_file import write_entries  # noqa: PLC0415 - imports yaml
    from broker.cli.entry_values import values_of  # noqa: PLC0415

    here = settings()
    found = [values_of(one) for one in _list(here, entry_filters.message(given))]
    here.shown.raw(write_entries(found, given["owner"] or ""))
    here.shown.next("broker entry apply -f FILE --dry-run")


def create_all(file: str) -> None:
    """Create every entry of a file, as SPIRE's ``entry create -data`` does: what is there already is an error."""
    from broker.cli.entry_file import read_entries  # noqa: PLC0415 - imports yaml

    here = settings()
    steps = [Step(Action.CREATE, {"id": "", "owner": "", **entry}) for entry in read_entries(file).entries]
    if here.dry_run:
        here.shown.many(SHAPE, [_row(step) for step in steps])
        here.shown.talk("nothing was sent (--dry-run)")
        return
    if _carry_out(here, steps, steps) != EXIT_OK:
        raise _not_all()


def _plan(here: Settings, file: str, owner: str, *, prune: bool, take_over: bool) -> list[Step]:
    from broker.cli.entry_file import read_entries  # noqa: PLC0415 - imports yaml
    from broker.cli.entry_values import values_of  # noqa: PLC0415

    wanted = read_entries(file)
    current = [values_of(one) for one in _list(here)]
    return plan(wanted.entries, current, owner=owner or wanted.owner, prune=prune, take_over=take_over)


def _list(here: Settings, wanted: Any = None) -> Sequence[Any]:
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Entries  # noqa: PLC0415

    return with_server(here, lambda channel: Entries(channel, timeout=here.timeout).list(wanted))


def _carry_out(here: Settings, steps: Sequence[Step], doing: Sequence[Step]) -> int:
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.cli.entry_values import message  # noqa: PLC0415
    from broker.client import Entries  # noqa: PLC0415

    parts = {action: [step for step in doing if step.action is action] for action in Action}

    async def act(channel: Any) -> list[tuple[Step, Any]]:
        entries = Entries(channel, timeout=here.timeout)
        done: list[tuple[Step, Any]] = []
        # Deletions first: what is to come may say the same as what is to go.
        for action, do, write in (
            (Action.DELETE, entries.delete_many, lambda values: values["id"]),
            (Action.UPDATE, entries.replace_many, message),
            (Action.CREATE, entries.create_many, message),
        ):
            part = parts[action]
            statuses = await do([write(step.entry) for step in part])
            done += zip(part, statuses, strict=True)
        return done

    outcomes = with_server(here, act)
    failed = [(step, status) for step, status in outcomes if status.code]
    rows = [_row(step, error=status.message or "failed" if status.code else "") for step, status in outcomes]
    if rows or here.shown.format is not None:
        here.shown.many(SHAPE, rows)
    here.shown.talk(_summary(steps) + (f"; {len(failed)} FAILED" if failed else ""))
    return EXIT_FAILED if failed else EXIT_OK


def _row(step: Step, error: str = "") -> dict[str, Any]:
    entry: Values = step.entry
    return {
        "action": step.action.value,
        "id": entry["id"],
        "spiffe_id": entry["spiffe_id"],
        "parent_id": entry["parent_id"],
        "selectors": list(entry["selectors"]),
        "changes": {name: {"from": old, "to": new} for name, (old, new) in step.changes.items()},
        "error": error,
    }


def _summary(steps: Sequence[Step]) -> str:
    counted = Counter(step.action for step in steps)
    return ", ".join(f"{counted[action]} to {action}" for action in Action if action is not Action.UNCHANGED) + (
        f", {counted[Action.UNCHANGED]} unchanged"
    )


def _not_all() -> Exception:
    from broker.errors import BrokerError  # noqa: PLC0415

    return BrokerError("not every entry was created", code="not_all_created", hint="the table says which, and why")
