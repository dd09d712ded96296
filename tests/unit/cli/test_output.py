"""Formats are promises: JSON's shape, names, times; stdout is data and stderr is talk; every error has its exit code."""

import io
import json
from datetime import UTC, datetime, timedelta, timezone

import pytest

from broker.cli.output import (
    Column,
    Format,
    Output,
    Shape,
    exit_code_of,
    moment,
    report,
    report_usage,
    timestamp,
)
from broker.errors import (
    BrokerError,
    Conflict,
    Invalid,
    InvalidSelector,
    InvalidSvid,
    InvalidToken,
    Misconfigured,
    NoIdentity,
    NotAttested,
    NotFound,
    PolicyDenied,
    Refused,
    Unavailable,
)

SHAPE = Shape(
    "entry", "entries", (Column("id", "id"), Column("selectors", "selectors"), Column("made", "at", wide=True))
)
AT = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=timezone(timedelta(hours=1)))
ROWS = [{"id": "a", "selectors": ["x:1", "x:2"], "at": AT}, {"id": "b", "selectors": [], "at": None}]


def shown(format_: Format | None, *, quiet: bool = False) -> Output:
    return Output(format_, quiet=quiet, out=io.StringIO(), err=io.StringIO())


def text(output: Output) -> str:
    assert isinstance(output.out, io.StringIO)
    return output.out.getvalue()


def talk(output: Output) -> str:
    assert isinstance(output.err, io.StringIO)
    return output.err.getvalue()


def test_json_has_kind_and_items_and_utc_times() -> None:
    output = shown(Format.JSON)
    output.many(SHAPE, ROWS)
    assert json.loads(text(output)) == {
        "kind": "entries",
        "items": [
            {"id": "a", "selectors": ["x:1", "x:2"], "at": "2026-01-02T02:04:05Z"},
            {"id": "b", "selectors": [], "at": None},
        ],
    }


def test_one_thing_in_json_is_the_object_with_its_kind() -> None:
    output = shown(Format.JSON)
    output.one(SHAPE, ROWS[0])
    assert json.loads(text(output))["kind"] == "entry"
    assert json.loads(text(output))["id"] == "a"


def test_jsonl_is_one_object_a_line() -> None:
    output = shown(Format.JSONL)
    output.many(SHAPE, ROWS)
    assert [json.loads(line)["kind"] for line in text(output).splitlines()] == ["entry", "entry"]


def test_names() -> None:
    output = shown(Format.NAME)
    output.many(SHAPE, ROWS)
    output.one(SHAPE, ROWS[0])
    assert text(output) == "entry/a\nentry/b\nentry/a\n"


@pytest.mark.parametrize("format_", [None, Format.TABLE])
def test_table(format_: Format | None) -> None:
    output = shown(format_)
    output.many(SHAPE, ROWS)
    assert text(output) == "ID  SELECTORS\na   x:1, x:2\nb   -\n"


def test_wide_shows_more() -> None:
    output = shown(Format.WIDE)
    output.many(SHAPE, ROWS)
    assert text(output).splitlines()[0].split() == ["ID", "SELECTORS", "MADE"]


def test_one_thing_for_people_is_upright() -> None:
    output = shown(None)
    output.one(SHAPE, ROWS[0], full=True)
    assert text(output) == "id         a\nselectors  x:1, x:2\nmade       2026-01-02T02:04:05Z\n"


def test_an_empty_table_is_talk_and_empty_json_is_data() -> None:
    output = shown(None)
    output.many(SHAPE, [])
    assert (text(output), talk(output)) == ("", "no entries\n")
    output = shown(Format.JSON)
    output.many(SHAPE, [])
    assert json.loads(text(output)) == {"kind": "entries", "items": []}


def test_what_others_wrote_does_not_steer_the_terminal() -> None:
    output = shown(None)
    output.many(SHAPE, [{"id": "a\x1b[2J", "selectors": ["b\u202e"]}])
    assert "\x1b" not in text(output)
    assert "\u202e" not in text(output)
    assert "\\x1b[2J" in text(output)


def test_quiet_leaves_data_and_errors() -> None:
    output = shown(None, quiet=True)
    output.talk("hello")
    output.next("broker x")
    assert talk(output) == ""
    output.error("code", "message", "hint")
    assert talk(output) == "error: message\nhint: hint\n"


def test_an_error_in_json() -> None:
    output = shown(Format.JSON)
    output.error("no_identity_issued", "no identity issued", "a hint")
    assert json.loads(talk(output)) == {
        "error": {"code": "no_identity_issued", "message": "no identity issued", "hint": "a hint", "reference": None}
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BrokerError("x"), 1),
        (Conflict("x"), 1),
        (Invalid("x"), 2),
        (InvalidSelector("x"), 2),
        (NotFound("x"), 3),
        (Refused("x"), 4),
        (NoIdentity("x"), 4),
        (NotAttested("x"), 4),
        (PolicyDenied("x"), 4),
        (InvalidSvid("x"), 5),
        (InvalidToken("x"), 5),
        (Unavailable("x"), 75),
        (Misconfigured("x"), 78),
    ],
)
def test_exit_codes(error: BrokerError, code: int) -> None:
    assert exit_code_of(error) == code
    output = shown(None)
    assert report(error, output) == code
    if type(error) is not BrokerError:
        assert "hint: " in talk(output)  # every refusal says what to do next


def test_the_error_s_own_hint_wins() -> None:
    output = shown(None)
    report(NotFound("x", hint="do this"), output)
    assert talk(output) == "error: x\nhint: do this\n"


def test_one_error_of_a_group_is_that_error() -> None:
    assert report(ExceptionGroup("g", [ExceptionGroup("h", [Unavailable("x")])]), shown(None)) == 75


def test_an_interrupt_is_130() -> None:
    assert report(KeyboardInterrupt(), shown(None)) == 130


def test_a_defect_shows_a_reference_and_nothing_else() -> None:
    output = shown(Format.JSON)
    assert report(ValueError("with a secret"), output) == 1
    error = json.loads(talk(output))["error"]
    assert error["code"] == "internal"
    assert error["reference"] in error["message"]
    assert "secret" not in talk(output)


def test_a_defect_shows_its_trace_when_asked() -> None:
    output = shown(None)
    output.verbose = True
    report(ValueError("boom"), output)
    assert "ValueError: boom" in talk(output)


def test_usage_is_2() -> None:
    output = shown(None)
    assert report_usage("no such option", output) == 2
    assert talk(output).startswith("error: no such option\nhint: ")


def test_no_colour_without_a_terminal() -> None:
    output = shown(None)
    output.error("c", "m")
    assert "\x1b" not in talk(output)


@pytest.mark.parametrize(("no_color", "coloured"), [("1", False), ("", True)])
def test_no_color(monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("NO_COLOR", no_color)
    output = Output(None, out=io.StringIO(), err=Terminal())
    output.error("c", "m")
    assert ("\x1b[" in talk(output)) is coloured


def test_times() -> None:
    assert moment(0) is None
    assert moment(1) == datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    assert timestamp(AT) == "2026-01-02T02:04:05Z"


class Terminal(io.StringIO):
    """What a person sees; a file where ``is_one`` is False."""

    def __init__(self, *, is_one: bool = True) -> None:
        super().__init__()
        self._is_one = is_one

    def isatty(self) -> bool:
        return self._is_one


def test_progress_is_one_line_for_a_person_and_nothing_for_anybody_else() -> None:
    screen = Terminal()
    shown = Output(err=screen, out=io.StringIO())
    shown.progress("500 tasks read")
    shown.progress("")
    assert screen.getvalue() == "\r500 tasks read\x1b[K\r\x1b[K"
    for other in (
        Output(err=(file := Terminal(is_one=False))),
        Output(err=file, format=Format.JSON),
        Output(err=Terminal(), quiet=True),
    ):
        other.progress("500 tasks read")
        assert other.err.getvalue() == ""  # type: ignore[attr-defined]
