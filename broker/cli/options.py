"""Options that every verb takes, and the kinds of values that several take. SPIRE's spellings are accepted, not shown.

The values end up in one :class:`Settings`, whichever side of the noun they were written on. Knows no verb.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

import click
from click.core import ParameterSource

from broker.cli.output import Format, Output
from broker.errors import BrokerError, Invalid

SERVER_SOCKET: Final = "/run/broker/server/private/api.sock"
AGENT_SOCKET: Final = "/run/broker/agent/public/api.sock"
ADMIN_SOCKET: Final = "private/admin.sock"
DEFAULT_TIMEOUT: Final = 10.0
"""Seconds for one call."""
MAX_SECONDS: Final = 366 * 86400

_DURATION: Final = re.compile(r"(?:([0-9]{1,4})d)?(?:([0-9]{1,6})h)?(?:([0-9]{1,8})m)?(?:([0-9]{1,9})s?)?")


@dataclass(slots=True)
class Settings:
    """What the options that stand everywhere say."""

    output: Format | None = None
    quiet: bool = False
    verbose: bool = False
    socket: str | None = None
    addr: str | None = None
    timeout: float = DEFAULT_TIMEOUT
    dry_run: bool = False
    yes: bool = False
    no_input: bool = False
    shown: Output = field(default_factory=Output)

    def server_socket(self) -> str:
        """Where the server's admin socket is."""
        return socket_path(self.socket or os.environ.get("BROKER_SERVER_SOCKET") or SERVER_SOCKET)

    def server_address(self) -> str | None:
        """The server's TLS port, when it is to be reached there: by ``--addr``, or where no admin socket is named."""
        if self.addr or self.socket or os.environ.get("BROKER_SERVER_SOCKET"):
            return self.addr
        return os.environ.get("BROKER_ADDR")

    def agent_socket(self) -> str:
        """Where the workload socket is (SPIFFE Workload Endpoint, section 4)."""
        return socket_path(self.socket or os.environ.get("SPIFFE_ENDPOINT_SOCKET") or AGENT_SOCKET)

    def agent_admin_socket(self) -> str:
        """Where the agent's admin socket is: named, or beside the workload socket, as SPIRE lays them out, too."""
        if self.socket:
            return socket_path(self.socket)
        public = self.agent_socket()
        runtime = os.path.dirname(os.path.dirname(public))  # noqa: PTH120 - text: nothing is looked up
        return f"{runtime.rstrip('/')}/{ADMIN_SOCKET}"

    def confirm(self, question: str, stdin: TextIO | None = None) -> None:
        """Ask a person before something is lost; raises Invalid when nobody may be asked, or the answer is no."""
        if self.yes or self.dry_run:
            return
        asked = stdin or sys.stdin
        if self.no_input:
            raise Invalid(f"{question} Nobody may be asked.", code="confirmation_required", hint="add --yes")
        if asked.isatty() and not click.confirm(question, err=True):
            raise Invalid("nothing was done", code="not_confirmed", hint="add --yes to skip the question")


def settings() -> Settings:
    """Give the settings of the command that runs."""
    found = click.get_current_context().find_root().obj
    assert isinstance(found, Settings)
    return found


def socket_path(text: str) -> str:
    """Read ``unix:///path``, ``unix:/path`` or a path; raises Invalid."""
    path = text.removeprefix("unix://") if text.startswith("unix://") else text.removeprefix("unix:")
    if not path.startswith("/"):
        raise Invalid(
            f"not a Unix socket: {text!r}", code="bad_socket", hint="write unix:///absolute/path, or the path alone"
        )
    return path


class Duration(click.ParamType[int]):
    """``90s``, ``10m``, ``1h30m``, ``2d`` or seconds, as whole seconds."""

    name = "duration"

    def __init__(self, least: int = 0) -> None:
        """``least``: where nothing is not a way to say the default."""
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        if isinstance(value, int):
            return value
        match = _DURATION.fullmatch(str(value))
        if not value or match is None:
            self.fail(f"{value!r} is not a duration: write it as 90s, 10m, 1h30m or 2d", param, ctx)
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        if total > MAX_SECONDS:
            self.fail("a duration is at most a year", param, ctx)
        if total < self._least:
            self.fail(f"{value!r} is too short: leave it out for the default", param, ctx)
        return total


class Parsed(click.ParamType[str]):
    """Text that one of our own parsers accepts; a refusal becomes a usage error with the parser's reason."""

    def __init__(self, name: str, parse: Callable[[], Callable[[str], object]]) -> None:
        """``parse`` gives the parser when it is needed, so that nothing is imported before."""
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check it, and give the canonical text."""
        try:
            return str(self._parse()(value))
        except BrokerError as error:
            self.fail(error.message + (f" ({error.hint})" if error.hint else ""), param, ctx)


def _spiffe_id() -> Callable[[str], object]:
    from broker.spiffe.ids import SpiffeId  # noqa: PLC0415 - imports cryptography by way of the package

    return SpiffeId


def _selector() -> Callable[[str], object]:
    from broker.spiffe.selectors import Selector  # noqa: PLC0415 - as above

    return Selector


def _trust_domain() -> Callable[[str], object]:
    from broker.spiffe.ids import TrustDomain  # noqa: PLC0415 - as above

    return TrustDomain


DURATION = Duration()
LIFETIME = Duration(least=1)
SPIFFE_ID = Parsed("spiffe-id", _spiffe_id)
TRUST_DOMAIN = Parsed("trust-domain", _trust_domain)
SELECTOR = Parsed("type:value", _selector)


class Option(click.Option):
    """An option that also answers to SPIRE's spellings: ``spire=["spiffeID"]`` accepts -spiffeID and --spiffeID."""

    def __init__(self, *args: Any, spire: Sequence[str] = (), **kwargs: Any) -> None:
        """Take what click takes, and the other spellings."""
        super().__init__(*args, **kwargs)
        self._spire = [dashes + name for name in spire for dashes in ("-", "--")]

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser know the other spellings; help and error texts keep to ours."""
        shown = self.opts
        self.opts = [*shown, *(name for name in self._spire if name not in shown)]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown


def option(*names: str, spire: Sequence[str] = (), **attributes: Any) -> Callable[[Any], Any]:
    """Declare an option of a verb."""
    return click.option(*names, cls=Option, spire=spire, **attributes)


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if ctx.get_parameter_source(param.name or "") in {ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT}:
        kept: Settings = ctx.find_root().obj
        setattr(kept, str(param.name), Format(value) if param.name == "output" else value)
        kept.shown.format, kept.shown.quiet, kept.shown.verbose = kept.output, kept.quiet, kept.verbose


def _everywhere() -> Iterator[click.Option]:
    def made(*names: str, spire: Sequence[str] = (), **attributes: Any) -> click.Option:
        return Option(names, spire=spire, expose_value=False, callback=_keep, **attributes)

    formats = [one.value for one in Format]
    yield made("-o", "--output", spire=["output"], type=click.Choice(formats), help="How the answer is written.")
    yield made("-q", "--quiet", is_flag=True, help="No talk: data and errors only.")
    yield made("-v", "--verbose", is_flag=True, help="Codes, and the trace of an internal error.")
    yield made("--socket", spire=["socketPath"], metavar="PATH", help="The admin or workload socket to use.")
    yield made("--addr", metavar="HOST:PORT", help="The server's TLS port, as an admin workload.")
    yield made("--timeout", spire=["timeout"], type=DURATION, metavar="DURATION", help="For each call. Default: 10s.")
    yield made("--dry-run", is_flag=True, help="Check and show what would be sent; change nothing.")
    yield made("--yes", is_flag=True, help="Answer yes to questions.")
    yield made("--no-input", is_flag=True, help="Never ask.")


EVERYWHERE: Final[Sequence[click.Option]] = tuple(_everywhere())


class _WithEverywhere(click.Command):
    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Add the options that stand everywhere."""
        return [*super().get_params(ctx), *EVERYWHERE]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the verb's own options first, the others under their own heading."""
        own = [p.get_help_record(ctx) for p in self.get_params(ctx) if p not in EVERYWHERE]
        with _section(formatter, "Options", [record for record in own if record is not None]):
            pass
        if not isinstance(self, click.Group):
            everywhere = [p.get_help_record(ctx) for p in EVERYWHERE]
            with _section(formatter, "Everywhere", [record for record in everywhere if record is not None]):
                pass
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)


@contextmanager
def _section(formatter: click.HelpFormatter, title: str, records: list[tuple[str, str]]) -> Iterator[None]:
    if records:
        with formatter.section(title):
            formatter.write_dl(records)
    yield


class Verb(_WithEverywhere):
    """A verb."""


class Noun(_WithEverywhere, click.Group):
    """A noun: verbs below it."""

    command_class = Verb


def noun(name: str, help: str) -> Noun:  # noqa: A002 - click's own name
    """Make a noun; verbs are added with ``@made.command("verb")``."""
    return Noun(name=name, help=help, short_help=help)
