"""``broker policy``: the rules that narrow what agents may have. Check and test ask no server; show, push and explain do."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from broker.cli.inputs import read_file
from broker.cli.options import SPIFFE_ID, noun, option, settings
from broker.cli.output import EXIT_UNVERIFIED, Column, Format, Shape, moment, timestamp

CHECK = Shape(
    "policy_check",
    "policy_checks",
    (
        Column("valid", "valid"),
        Column("rules", "rules"),
        Column("hash", "hash"),
        Column("problems", "problems", wide=True),
    ),
    name="hash",
)
CASE = Shape(
    "policy_case",
    "policy_cases",
    (
        Column("case", "name"),
        Column("holds", "holds"),
        Column("expected", "expected"),
        Column("decided", "decided"),
        Column("by", "rules"),
        Column("errors", "errors", wide=True),
    ),
    name="name",
)
POLICY = Shape(
    "policy",
    "policies",
    (
        Column("hash", "hash"),
        Column("source", "source"),
        Column("put by", "put_by"),
        Column("put at", "put_at"),
        Column("in force", "in_force"),
        Column("rules", "rules", wide=True),
    ),
    name="hash",
)
DECISION = Shape(
    "decision",
    "decisions",
    (Column("effect", "effect"), Column("rules", "rules"), Column("policy", "policy"), Column("message", "message")),
    name="effect",
)
ACTIONS = (
    "startTask",
    "startChild",
    "handOff",
    "resumeTask",
    "issueToken",
    "issueTransactionToken",
    "issueGrant",
    "approve",
)
BUILT_IN = "built-in"
_PEOPLE = frozenset({None, Format.TABLE, Format.WIDE})

COMMAND = noun("policy", "The rules that narrow what agents may have, in Cedar.")


@COMMAND.command("check")
@click.argument("file", metavar="FILE|-")
def check(file: str) -> int:
    """Read a policy as a server would: its form, the schema, and what would not do what it seems to. Exit code 5: refused."""
    bundles = _bundles()
    here = settings()
    text = _policy_text(file)
    try:
        found = bundles.read(text)
    except bundles.PolicyRefused as error:
        problems = [{"rule": one.rule or None, "code": one.code, "message": one.message} for one in error.problems]
        if here.shown.format in _PEOPLE:
            here.shown.lines(f"{one['rule'] or 'policy'}: {one['message']} ({one['code']})" for one in problems)
        else:
            row = {"valid": False, "hash": bundles.hash_of(text), "rules": None, "problems": problems}
            here.shown.one(CHECK, row)
        here.shown.talk(f"refused: {len(problems)} problem{'s' if len(problems) > 1 else ''}")
        return EXIT_UNVERIFIED
    here.shown.one(CHECK, {"valid": True, "hash": found.hash, "rules": len(found.rules), "problems": []})
    if found.is_closed:
        here.shown.talk("note: no rule permits an agent anything, so this policy denies everything")
    if found.lacks_approver:
        here.shown.talk('note: rules want a person\'s approval, and none permits Action::"approve" to anybody')
    here.shown.next(f"broker policy test CASES --policy {file}")
    return 0


@COMMAND.command("test")
@click.argument("file", metavar="CASES|-")
@option("--policy", metavar="FILE", help='Which policy, instead of the one that the file names; "built-in" is known.')
def test(file: str, policy: str | None) -> int:
    """Ask a policy questions whose answers are known (docs/how-to/write-policies.md has the form). Exit code 5: one does not hold."""
    bundles = _bundles()
    from broker.cli.policy_file import read_cases, run_cases  # noqa: PLC0415 - imports the rules

    here = settings()
    told = read_cases(file)
    wanted = policy or told.policy
    if not wanted:
        raise click.UsageError("the file names no policy: add policy: FILE, or say --policy")
    results = run_cases(bundles.read(_policy_text(wanted)), told.cases)
    here.shown.many(
        CASE,
        [
            {
                "name": one.case.name,
                "holds": one.holds,
                "expected": one.case.effect.value,
                "expected_rules": None if one.case.rules is None else sorted(one.case.rules),
                "decided": one.decision.effect.value,
                "rules": list(one.decision.rules),
                "errors": list(one.decision.errors),
            }
            for one in results
        ],
    )
    failed = sum(not one.holds for one in results)
    here.shown.talk(f"{len(results) - failed} of {len(results)} hold")
    return EXIT_UNVERIFIED if failed else 0


@COMMAND.command("show")
@option("--hash", "hash_", metavar="HASH", default="", help="An older one, as decisions and records name it.")
def show(hash_: str) -> None:
    """Show the policy in force, which people can save and change."""
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Policies  # noqa: PLC0415

    here = settings()
    found = with_server(here, lambda channel: Policies(channel, timeout=here.timeout).get(hash_))
    if here.shown.format is not None:
        here.shown.one(POLICY, _policy_row(found))
        return
    here.shown.lines(found.text.splitlines())
    at = moment(found.put_at)
    here.shown.talk(f"{found.hash}, {found.source}, put in force by {found.put_by} at {timestamp(at) if at else '-'}")


@COMMAND.command("push")
@click.argument("file", required=False, metavar="[FILE|-]")
@option("--built-in", is_flag=True, help="Go back to the policy that a server has when it is given no other.")
@option("--expect", metavar="HASH", default="", help="Only if this one is in force now: nobody else's change is lost.")
def push(file: str | None, built_in: bool, expect: str) -> None:
    """Put a policy in force on all replicas, at once. Tasks and tokens that it denies end."""
    if (file is None) != built_in:
        raise click.UsageError("name a file, or --built-in")
    here = settings()
    text = _policy_text(BUILT_IN if file is None else file)
    if not here.dry_run:
        here.confirm("Put this policy in force? Tasks and tokens that it denies end at once.")
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Policies  # noqa: PLC0415

    async def act(channel: Any) -> Any:
        return await Policies(channel, timeout=here.timeout).push(text, expected_hash=expect, check_only=here.dry_run)

    put = with_server(here, act)
    here.shown.one(POLICY, _policy_row(put))
    if here.dry_run:
        here.shown.talk("the server accepts it; nothing was put in force (--dry-run)")
        return
    here.shown.next("broker policy explain --agent ID --user NAME --audience URI --action startTask")


@COMMAND.command("explain")
@option("--agent", required=True, type=SPIFFE_ID, help="Who acts, or would once it is approved.")
@option("--user", required=True, help="For whom, as tasks name the user.")
@option("--approver", default="", metavar="USER", help="With --action approve: who would approve it.")
@option("--approver-issuer", default="", metavar="URL", help="The approver's issuer. Default: the user's.")
@option("--audience", required=True, metavar="URI", help="At which service.")
@option("--action", required=True, type=click.Choice(ACTIONS), help="What is asked for.")
@option("--do", "names", multiple=True, metavar="NAME", help="What it would do there, such as ticket.read. Repeatable.")
@option("--identified", is_flag=True, help="Each of these is limited to one named thing.")
@option("--issuer", default="", metavar="URL", help="The user's issuer. Default: the only one of the settings.")
@option("--acr", default="", help="How the user (or the approver) logged in.")
@option("--auth-age", type=click.IntRange(0), default=None, help="How many seconds ago that was.")
@option("--hop", type=click.IntRange(0), default=0, help="How many agents stand above it.")
@option(
    "--supervision", type=click.Choice(["attached", "lease", "none"]), default="attached", help="Default: attached."
)
@option("--risk", type=click.Choice(["high", "normal", "low"]), default=None, help="Of an audience not registered yet.")
def explain(*, names: tuple[str, ...], auth_age: int | None, risk: str | None, **told: Any) -> None:
    """Ask the server what the policy in force decides, and why, rule by rule. Nothing happens by it."""
    from broker._proto.broker.server.v1 import policies_pb2  # noqa: PLC0415 - imports protobuf

    question = policies_pb2.PolicyQuestion(actions=names, auth_age=auth_age, risk=risk or "", **told)
    show_decision(policies_pb2.ExplainDecisionRequest(question=question))


def show_decision(request: Any) -> None:
    """Ask the server for an explanation and show it; for ``broker explain`` as well."""
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Policies  # noqa: PLC0415

    here = settings()
    told = with_server(here, lambda channel: Policies(channel, timeout=here.timeout).explain(request))
    if here.shown.format in _PEOPLE:
        here.shown.lines(decision_lines(told))
    else:
        here.shown.one(DECISION, decision_row(told))


def decision_lines(told: Any) -> Iterator[str]:
    """Say it to a person."""
    if told.task_id:
        yield f"task {told.task_id}  ({told.task_state})"
    for part in told.parts:
        asked = part.question
        by = f" by {asked.approver}" if asked.approver else ""
        yield f"{asked.action}{by}  {asked.agent}  for {asked.user}  at {asked.audience} ({asked.risk} risk)"
        width = max((len(one.id) for one in part.trace), default=0)
        yield from (f"  {one.effect:<6}  {one.id:<{width}}  {one.standing}" for one in part.trace)
        yield from (f"  error   {one}" for one in part.errors)
        yield f"  {part.effect}"
    yield f"result: {told.message} ({told.code})"
    if told.hint:
        yield f"hint: {told.hint}"
    yield f"policy: {told.policy}"


def decision_row(told: Any) -> dict[str, object]:
    """Give an explanation as JSON values."""
    return {
        "effect": told.effect,
        "code": told.code,
        "message": told.message,
        "hint": told.hint or None,
        "policy": told.policy,
        "rules": list(told.rules),
        "errors": list(told.errors),
        "task": told.task_id or None,
        "task_state": told.task_state or None,
        "parts": [
            {
                "question": _question_row(part.question),
                "effect": part.effect,
                "rules": list(part.rules),
                "errors": list(part.errors),
                "trace": [{"id": one.id, "effect": one.effect, "standing": one.standing} for one in part.trace],
            }
            for part in told.parts
        ],
    }


def _question_row(asked: Any) -> dict[str, object]:
    texts = ("action", "agent", "user", "issuer", "audience", "risk", "hop", "supervision", "identified")
    return {
        **{name: getattr(asked, name) for name in texts},
        "actions": list(asked.actions),
        "approver": asked.approver or None,
        "approver_issuer": asked.approver_issuer or None,
        "acr": asked.acr or None,
        "auth_age": asked.auth_age if asked.HasField("auth_age") else None,
    }


def _policy_row(found: Any) -> Mapping[str, object]:
    return {
        "hash": found.hash,
        "version": found.version or None,
        "source": found.source or None,
        "put_by": found.put_by or None,
        "put_at": moment(found.put_at),
        "in_force": found.in_force,
        "rules": list(_rule_rows(found.rules)),
        "text": found.text,
    }


def _rule_rows(rules: Iterable[Any]) -> Iterator[dict[str, object]]:
    for one in rules:
        yield {"id": one.id, "effect": one.effect, "by_approval": one.by_approval, "advice": one.advice or None}


def _policy_text(file: str) -> str:
    bundles = _bundles()
    if file == BUILT_IN:
        text: str = bundles.built_in_text()
        return text
    return read_file(file, "the policy", limit=bundles.MAX_BYTES, as_it_is=True)


def _bundles() -> Any:
    try:
        from broker.server.tasks.policy import bundle  # noqa: PLC0415 - imports the engine
    except ModuleNotFoundError as error:
        from broker.errors import Misconfigured  # noqa: PLC0415

        if (error.name or "").startswith("broker"):
            raise
        raise Misconfigured(
            f"policies need {error.name}, which is not installed", hint="pip install 'identity-broker[server]'"
        ) from None
    return bundle
