"""What the command prints, and how: the one place for formats, for errors and for exit codes.

stdout is data, stderr is talk. JSON is an object with ``kind`` and ``items``, or the one object with its ``kind``; times are
RFC 3339 in UTC; only names are added over time. Knows nothing of what is printed.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final, TextIO

from broker.cli.yaml import to_yaml
from broker.errors import (
    BrokerError,
    Conflict,
    Invalid,
    InvalidSvid,
    InvalidToken,
    Misconfigured,
    NoIdentity,
    NotAttested,
    NotFound,
    Refused,
    Unavailable,
)

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_REFUSED, EXIT_UNVERIFIED = 0, 1, 2, 3, 4, 5
EXIT_UNAVAILABLE, EXIT_MISCONFIGURED, EXIT_INTERRUPTED = 75, 78, 130

# The first line that fits is the answer: a class stands above the class it is derived from.
_EXITS: Final[tuple[tuple[type[BrokerError], int], ...]] = (
    (InvalidSvid, EXIT_UNVERIFIED),
    (InvalidToken, EXIT_UNVERIFIED),
    (Invalid, EXIT_USAGE),
    (NotFound, EXIT_NOT_FOUND),
    (Refused, EXIT_REFUSED),
    (Unavailable, EXIT_UNAVAILABLE),
    (Misconfigured, EXIT_MISCONFIGURED),
    (BrokerError, EXIT_FAILED),
)
# What to do next where the error itself does not say: the peer may be another product, or may not tell this caller more.
_HINTS: Final[tuple[tuple[type[BrokerError], str], ...]] = (
    (
        NoIdentity,
        "no entry fits this process: broker entry list shows what each asks for, broker entry create adds one",
    ),
    (NotAttested, "the agent could not tell who this process is; its log says why"),
    (Refused, "this identity or user may not; the log of the program that refused says why"),
    (InvalidSvid, "ask its holder for a new one"),
    (InvalidToken, "broker token inspect shows what it says; ask its holder for a new one"),
    (Invalid, "the same verb with --help says what it takes"),
    (NotFound, "the noun's verb list shows what is there"),
    (Conflict, "the noun's verb list shows what is there already; what moved on, read again"),
    (Unavailable, "try again; broker server health and broker agent health ask who is up"),
    (Misconfigured, "the settings file must change; run with --dry-run to check it"),
)
_USAGE_HINT: Final = "broker --help, or broker NOUN VERB --help"
_BOLD, _RED, _DIM, _PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[2m", "\x1b[0m"

Row = Mapping[str, object]


class Format(StrEnum):
    """The six formats of ``-o``."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    JSONL = "jsonl"
    YAML = "yaml"
    NAME = "name"


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its heading, the member it shows, and whether only ``-o wide`` shows it."""

    title: str
    key: str
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """How one kind of thing is shown: ``kind`` of one, ``plural`` of many, and the member that names it."""

    kind: str
    plural: str
    columns: Sequence[Column]
    name: str = "id"


@dataclass(slots=True)
class Output:
    """Where things go. ``format`` None is a table."""

    format: Format | None = None
    quiet: bool = False
    verbose: bool = False
    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)

    @property
    def machine(self) -> bool:
        """Whether a program reads the answer."""
        return self.format in {Format.JSON, Format.JSONL}

    def many(self, shape: Shape, rows: Iterable[Row]) -> None:
        """Print a list."""
        found = [_plain(row) for row in rows]
        match self.format:
            case Format.JSON:
                self._json({"kind": shape.plural, "items": found})
            case Format.YAML:
                self.out.write(to_yaml({"kind": shape.plural, "items": found}))
            case Format.JSONL:
                for row in found:
                    self._line({"kind": shape.kind, **row})
            case Format.NAME:
                for row in found:
                    self.out.write(f"{shape.kind}/{_cell(row.get(shape.name))}\n")
            case _:
                self._table(shape, found)

    def one(self, shape: Shape, row: Row, *, full: bool = False) -> None:
        """Print one thing; ``full`` shows a person all of it, as ``-o wide`` does."""
        item = _plain(row)
        match self.format:
            case Format.JSON:
                self._json({"kind": shape.kind, **item})
            case Format.YAML:
                self.out.write(to_yaml({"kind": shape.kind, **item}))
            case Format.JSONL:
                self._line({"kind": shape.kind, **item})
            case Format.NAME:
                self.out.write(f"{shape.kind}/{_cell(item.get(shape.name))}\n")
            case _:
                columns = [c for c in shape.columns if full or not c.wide or self.format is Format.WIDE]
                width = max(len(column.title) for column in columns)
                for column in columns:
                    self.out.write(f"{column.title:<{width}}  {_cell(item.get(column.key))}\n")
        self.out.flush()

    def raw(self, text: str) -> None:
        """Print text as it is: a token, a file."""
        self.out.write(text if text.endswith("\n") else text + "\n")
        self.out.flush()

    def lines(self, lines: Iterable[str]) -> None:
        """Print lines for a person; what others wrote in them neither steers the terminal nor begins a line."""
        self.out.writelines(_safe(line).replace("\n", "\\n") + "\n" for line in lines)
        self.out.flush()

    def talk(self, text: str) -> None:
        """Tell a person something that is no data."""
        if not self.quiet:
            self.err.write(f"{_safe(text)}\n")
            self.err.flush()

    def progress(self, text: str) -> None:
        """Tell a person at a terminal how far something long is, on one line that is written over; empty wipes it."""
        if not self.quiet and not self.machine and self.err.isatty():
            self.err.write(f"\r{_safe(text)}\x1b[K")
            self.err.flush()

    def next(self, command: str) -> None:
        """Name the command that people usually want now."""
        if not self.quiet:
            self.err.write(f"{self._style(_DIM)}next: {_safe(command)}{self._style(_PLAIN)}\n")
            self.err.flush()

    def error(self, code: str, message: str, hint: str = "", reference: str | None = None) -> None:
        """Print an error: what happened, and what to do next."""
        if self.machine:
            body = {"error": {"code": code, "message": message, "hint": hint or None, "reference": reference}}
            self.err.write(json.dumps(body, ensure_ascii=False) + "\n")
        else:
            bold, plain = self._style(_BOLD + _RED), self._style(_PLAIN)
            shown = f" ({code})" if self.verbose else ""
            self.err.write(f"{bold}error:{plain} {_safe(message)}{shown}\n")
            if hint:
                self.err.write(f"hint: {_safe(hint)}\n")
        self.err.flush()

    def _table(self, shape: Shape, rows: Sequence[Row]) -> None:
        columns = [c for c in shape.columns if not c.wide or self.format is Format.WIDE]
        cells = [[_cell(row.get(column.key)) for column in columns] for row in rows]
        if not cells:
            self.talk(f"no {shape.plural.replace('_', ' ')}")
            return
        widths = [max(len(c.title), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
        for line in ([column.title.upper() for column in columns], *cells):
            self.out.write("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() + "\n")
        self.out.flush()

    def _json(self, value: object) -> None:
        self.out.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        self.out.flush()

    def _line(self, value: object) -> None:
        self.out.write(json.dumps(value, ensure_ascii=False) + "\n")
        self.out.flush()

    def _style(self, code: str) -> str:
        # https://no-color.org: any value that is not empty.
        return code if self.err.isatty() and not os.environ.get("NO_COLOR") else ""


def moment(seconds: float) -> datetime | None:
    """Give the time of whole seconds since 1970; the wire's 0 is none."""
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def timestamp(at: datetime) -> str:
    """Write a time as RFC 3339 in UTC, without fractions of a second."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def exit_code_of(error: BrokerError) -> int:
    """Give the exit code of an error, by the table."""
    return next(code for kind, code in _EXITS if isinstance(error, kind))


def report(error: BaseException, output: Output) -> int:
    """Print any error and give the exit code; what is no BrokerError is a defect, shown by a reference number alone."""
    cause = _leaf(error)
    if isinstance(cause, KeyboardInterrupt):
        output.talk("interrupted")
        return EXIT_INTERRUPTED
    if isinstance(cause, BrokerError):
        hint = next((text for kind, text in _HINTS if isinstance(cause, kind)), "")
        output.error(cause.reason, cause.message, cause.hint or hint)
        return exit_code_of(cause)
    reference = os.urandom(4).hex()
    if output.verbose:
        output.err.write("".join(traceback.format_exception(error)))
    output.error(
        "internal",
        f"internal error, reference {reference}",
        f"{type(cause).__name__}; run it again with -v for the trace, and report it" if not output.verbose else "",
        reference,
    )
    return EXIT_FAILED


def report_usage(message: str, output: Output, hint: str = "") -> int:
    """Print a wrong command line and give the exit code."""
    output.error("usage", message, hint or _USAGE_HINT)
    return EXIT_USAGE


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _plain(value: Row) -> dict[str, object]:
    return {name: _json_value(member) for name, member in value.items()}


def _json_value(value: object) -> object:
    if isinstance(value, datetime):
        return timestamp(value)
    if isinstance(value, Mapping):
        return {str(name): _json_value(member) for name, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(member) for member in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _cell(value: object) -> str:
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_cell(member) for member in value)
    if isinstance(value, dict):
        return _safe(json.dumps(value, ensure_ascii=False))
    return _safe(str(value))


def _safe(text: str) -> str:
    """Keep what others wrote from steering the terminal: control characters are shown, not sent."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
