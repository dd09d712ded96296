"""``broker explain``: the operator's "why not?". Asks the node agent about processes, the server about tasks; decides nothing."""

import click

from broker.cli.options import noun, option, settings
from broker.cli.output import moment, timestamp

COMMAND = noun(
    "explain",
    "Why a process has an identity or none (asks the agent, on its node), why a task or token may be (asks the server).",
)

_PEOPLE = frozenset({None, "table", "wide"})


@COMMAND.command("identity")
@option("--pid", type=click.IntRange(1, 2**31 - 1), help="A process of this node: what it would get if it asked now.")
@option("--selectors", multiple=True, metavar="A,B,C", help="Instead of a process: what one with these would get.")
@option("--entry", "entry_id", metavar="ID", help="This entry alone; by itself: what it asks for.")
def identity(pid: int | None, selectors: tuple[str, ...], entry_id: str | None) -> None:
    """Say which entries a process earns, and what the nearest others lack."""
    from broker._proto.broker.agent.v1 import admin_pb2  # noqa: PLC0415 - imports protobuf
    from broker.cli.connections import ask_agent_admin  # noqa: PLC0415
    from broker.cli.explanations import EXPLANATION, explanation_lines, explanation_row  # noqa: PLC0415

    named = [one.strip() for text in selectors for one in text.split(",") if one.strip()]
    if (pid is not None) == bool(named) and (named or not entry_id):
        raise click.UsageError("name one of --pid, --selectors and --entry; --entry may stand beside the others")
    here = settings()
    request = admin_pb2.ExplainIdentityRequest(pid=pid or 0, selectors=named, entry_id=entry_id or "")
    told = ask_agent_admin(here, "ExplainIdentity", request)
    if here.shown.format in _PEOPLE:
        here.shown.lines(explanation_lines(told))
    else:
        here.shown.one(EXPLANATION, explanation_row(told))


@COMMAND.command("denial")
@click.argument("denial_id", metavar="ID")
def denial(denial_id: str) -> None:
    """Say why a caller was refused, by the id in its error and in the agent's log."""
    from broker._proto.broker.agent.v1 import admin_pb2  # noqa: PLC0415 - imports protobuf
    from broker.cli.connections import ask_agent_admin  # noqa: PLC0415
    from broker.cli.explanations import DENIAL, explanation_lines, explanation_row  # noqa: PLC0415

    here = settings()
    told = ask_agent_admin(here, "ExplainDenial", admin_pb2.ExplainDenialRequest(id=denial_id))
    if here.shown.format in _PEOPLE:
        at = moment(told.at)
        head = [f"denial {told.id}", timestamp(at) if at else "", told.method or "at connection"]
        late = ["(entries as they are now)"] if told.is_late else []
        here.shown.lines(["  ".join(filter(None, head + late)), *explanation_lines(told.explanation)])
        return
    row = {"id": told.id, "at": moment(told.at), "method": told.method, "entries_are_late": told.is_late}
    here.shown.one(DENIAL, {**row, **explanation_row(told.explanation)})


@COMMAND.command("task")
@click.argument("task_id", metavar="ID")
def task(task_id: str) -> None:
    """Say whether the policy in force would let a task begin, and why. As an operator, of the server."""
    from broker._proto.broker.server.v1 import policies_pb2  # noqa: PLC0415 - imports protobuf
    from broker.cli.policy import show_decision  # noqa: PLC0415

    show_decision(policies_pb2.ExplainDecisionRequest(task_id=task_id))


@COMMAND.command("token")
@click.argument("token", default="-", metavar="[TOKEN|@FILE|-]")
def token(token: str) -> None:
    """Say whether the policy in force would issue a token of this server, and why. As an operator, of the server."""
    from broker._proto.broker.server.v1 import policies_pb2  # noqa: PLC0415 - imports protobuf
    from broker.cli.inputs import read_token  # noqa: PLC0415
    from broker.cli.policy import show_decision  # noqa: PLC0415

    text = read_token(token, "a token", settings().shown)
    show_decision(policies_pb2.ExplainDecisionRequest(token=text))
