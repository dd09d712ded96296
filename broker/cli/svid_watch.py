"""``broker svid watch``: the options of it, and what they may not say together. spiffe-helper's settings have their names here."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from broker.cli.options import SPIFFE_ID, Parsed, Settings, Verb, option, settings
from broker.cli.output import Column, Shape
from broker.errors import Invalid

if TYPE_CHECKING:
    from broker.cli.svid_reload import ReloadPlan
    from broker.cli.svid_watching import WatchPlan

F = TypeVar("F", bound=Callable[..., Any])

SHAPE = Shape("credential_files", "credential_files", (Column("files", "files"),), name="directory")
COMMAND = Shape(
    "command", "commands", (Column("command", "command"), Column("notes", "notes", wide=True)), name="command"
)
_HELP = """Keep this process's SVIDs in files, for programs that read files: as spiffe-helper does.

Each file is replaced as a whole, and no link is followed. CMD is started when all files are there, gets
--renew-signal when they change, and its end is the end of this command, with its exit code. Without a node agent, or while it
has no identity for this process, the files stay as they are and it tries again."""


class Mode(click.ParamType[int]):
    """A file's mode, octal; a secret's is never open to everybody."""

    name = "mode"

    def __init__(self, *, secret: bool) -> None:
        """``secret``: whoever may read the file may be the workload."""
        self._secret = secret

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        if isinstance(value, int):
            return value
        try:
            mode = int(str(value), 8)
        except ValueError:
            self.fail(f"{value!r} is not a mode: write it in octal, as 0640", param, ctx)
        if not 0 <= mode <= 0o777 or mode & 0o400 == 0 or mode & 0o022:
            self.fail(f"{value} is not a mode for this: its owner must read it, and nobody else write it", param, ctx)
        if self._secret and mode & 0o007:
            self.fail(
                f"{value} would let every user of this machine be this workload: use 0640 and a group", param, ctx
            )
        return mode


def _file_name() -> Callable[[str], object]:
    from broker.cli.credential_files import file_name  # noqa: PLC0415 - as the other parsers

    return file_name


def _signal() -> Callable[[str], object]:
    from broker.cli.svid_reload import signal_named  # noqa: PLC0415 - imports asyncio

    return lambda text: signal_named(text).name


def _address() -> Callable[[str], object]:
    from broker.cli.svid_health import health_address  # noqa: PLC0415 - imports asyncio

    def checked(text: str) -> str:
        health_address(text)
        return text

    return checked


NAME = Parsed("name", _file_name)


def _options(command: F) -> F:
    for add in reversed(
        (
            option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path),
                   help="Where the files are. Made, with mode 0700, where it is not there."),
            option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, help="Which of this process's identities."),
            option("--hint", default="", help="The identity with this hint."),
            option("--svid-file", "svid", type=NAME, default="svid.pem", help="Certificates. Default: svid.pem."),
            option("--key-file", "key", type=NAME, default="svid_key.pem", help="Default: svid_key.pem."),
            option("--bundle-file", "bundle", type=NAME, default="svid_bundle.pem", help="Default: svid_bundle.pem."),
            option("--no-x509", is_flag=True, help="Only what --jwt-svid and --jwt-bundle-file name."),
            option("--jwt-svid", "jwts", nargs=2, multiple=True, metavar="FILE AUDIENCE",
                   help="A JWT-SVID in a file. Repeatable; the same file again: one more audience."),
            option("--jwt-bundle-file", "jwt_bundles", type=NAME, help="The JWT bundles, as JSON."),
            option("--cert-mode", type=Mode(secret=False), default="0644", help="Default: 0644."),
            option("--key-mode", type=Mode(secret=True), default="0600", help="Default: 0600."),
            option("--jwt-svid-mode", "jwt_mode", type=Mode(secret=True), default="0600", help="Default: 0600."),
            option("--jwt-bundle-mode", type=Mode(secret=False), default="0600", help="Default: 0600."),
            option("--add-intermediates-to-bundle", is_flag=True, help="Certificates above the leaf go there instead."),
            option("--include-federated-domains", is_flag=True, help="Authorities of other trust domains, too."),
            option("--omit-expired", is_flag=True, help="No authority that has expired."),
            option("--remove-withdrawn", is_flag=True, help="Remove key and tokens when the identity is withdrawn."),
            option("--renew-signal", type=Parsed("signal", _signal), help="What CMD or the pid file's process gets."),
            option("--pid-file", type=click.Path(dir_okay=False, path_type=Path), help="Whom else to signal."),
            option("--exec", "each_time", metavar="COMMAND", help="Run this after each change, without a shell."),
            option("--once", is_flag=True, help="Write everything one time, and end."),
            option("--from-helper-conf", "helper_conf", type=click.File("r", encoding="utf-8"), metavar="FILE",
                   help="Print the command that does what a settings file of spiffe-helper says, and end."),
            option("--health", type=Parsed("address", _address), metavar="[HOST:]PORT", help="Serve /ready and /live."),
        )
    ):  # fmt: skip
        command = add(command)
    return command


@click.command("watch", cls=Verb, help=_HELP, context_settings={"allow_interspersed_args": False})
@_options
@click.argument("program", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD [ARGS]…]")
def watch(**given: Any) -> int:
    """Keep files."""
    here = settings()
    if (conf := given.pop("helper_conf")) is not None:
        return _print_equivalent(here, conf)
    if given["directory"] is None:
        raise click.MissingParameter(ctx=click.get_current_context(), param_hint="--dir", param_type="option")
    plan = _plan(given)
    if here.dry_run:
        names = [name for names in plan.wanted.parts.values() for name in names]
        here.shown.one(SHAPE, {"directory": plan.directory, "files": [str(plan.directory / name) for name in names]})
        here.shown.talk("nothing was written (--dry-run)")
        return 0
    from broker.cli.svid_watching import watch as run  # noqa: PLC0415 - the SDK

    code, files = run(here, plan)
    if plan.once:
        here.shown.one(SHAPE, {"directory": plan.directory, "files": list(files)})
        here.shown.next(f"broker svid watch --dir {plan.directory} keeps them fresh")
    return code


def _print_equivalent(here: Settings, conf: TextIO) -> int:
    from broker.cli.helper_conf import MAX_BYTES, equivalent, read  # noqa: PLC0415 - for those who move here alone

    try:
        text = conf.read(MAX_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"the file cannot be read: {error}", code="bad_helper_conf") from None
    found = equivalent(read(text))
    if here.output is None:
        here.shown.raw(shlex.join(found.argv))
    else:
        here.shown.one(COMMAND, {"command": shlex.join(found.argv), "arguments": found.argv[1:], "notes": found.notes})
    for note in found.notes:
        here.shown.talk(note)
    return 0


def _plan(given: dict[str, Any]) -> "WatchPlan":
    from broker.cli.svid_health import health_address  # noqa: PLC0415 - the SDK, from here on
    from broker.cli.svid_keeping import Wanted  # noqa: PLC0415
    from broker.cli.svid_watching import WatchPlan  # noqa: PLC0415

    jwts = _tokens(given.pop("jwts"))
    reload = _reload(given)
    plain = {name: given.pop(name) for name in ("directory", "once", "health", "no_x509")}
    if plain["once"] and reload.program:
        raise _wrong("--once ends when the files are written: there is no CMD to keep")
    if plain["no_x509"]:
        given |= {"svid": "", "key": "", "bundle": ""}
    members: dict[str, Any] = {name: "" if value is None else value for name, value in given.items()}
    wanted = Wanted(**members, jwts=jwts)
    names = [name for names in wanted.parts.values() for name in names]
    if not names:
        raise _wrong("--no-x509 leaves nothing to keep: add --jwt-svid or --jwt-bundle-file")
    if len(set(names)) != len(names):
        raise _wrong("two files have the same name")
    health = health_address(plain["health"]) if plain["health"] else None
    return WatchPlan(directory=plain["directory"], wanted=wanted, reload=reload, once=plain["once"], health=health)


def _reload(given: dict[str, Any]) -> "ReloadPlan":
    from broker.cli.svid_reload import ReloadPlan, signal_named  # noqa: PLC0415

    named, pid_file, each_time = (given.pop(name) for name in ("renew_signal", "pid_file", "each_time"))
    program: Sequence[str] = given.pop("program")
    if pid_file is not None and not named:
        raise _wrong("--pid-file needs --renew-signal")
    if named and not program and pid_file is None:
        raise _wrong("--renew-signal needs a CMD or a --pid-file")
    try:
        command = shlex.split(each_time) if each_time is not None else []
    except ValueError as error:
        raise _wrong(f"--exec cannot be read: {error}") from None
    if each_time is not None and not command:
        raise _wrong("--exec names no command")
    return ReloadPlan(
        program=program,
        each_time=command,
        pid_file=pid_file,
        renew_signal=signal_named(named) if named else None,
    )


def _tokens(given: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    from broker.cli.credential_files import file_name  # noqa: PLC0415

    found: dict[str, list[str]] = {}
    for name, audience in given:
        if not audience:
            raise _wrong("a JWT-SVID needs an audience that is not empty")
        found.setdefault(file_name(name), []).append(audience)
    return found


def _wrong(what: str) -> click.UsageError:
    return click.UsageError(what, click.get_current_context())
