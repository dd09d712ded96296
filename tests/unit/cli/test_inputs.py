"""Tokens come by file or standard input; on the command line they are taken with a warning."""

import io
from pathlib import Path

import pytest

from broker.cli.inputs import MAX_BYTES, read_file, read_text, read_token
from broker.cli.output import Output
from broker.errors import Invalid


def test_input() -> None:
    assert read_text("-", "it", stdin=io.StringIO(" a \n")) == "a"


def test_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("a\n")
    assert read_text(f"@{tmp_path}/f", "it") == read_file(str(tmp_path / "f"), "it") == "a"


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff", b"x" * (MAX_BYTES + 1)])
def test_no_good_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(Invalid, match="it"):
        read_file(str(tmp_path / "f"), "it")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="cannot be read"):
        read_text(f"@{tmp_path}/none", "it")


def test_a_token_on_the_command_line_is_a_risk(tmp_path: Path) -> None:
    output = Output(out=io.StringIO(), err=io.StringIO())
    assert read_token("a.b.c", "a token", output) == "a.b.c"
    assert isinstance(output.err, io.StringIO)
    assert "other users can see" in output.err.getvalue()
    (tmp_path / "f").write_text("a.b.c")
    quiet = Output(out=io.StringIO(), err=io.StringIO())
    read_token(f"@{tmp_path}/f", "a token", quiet)
    assert isinstance(quiet.err, io.StringIO)
    assert quiet.err.getvalue() == ""
