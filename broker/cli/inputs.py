"""How a verb is given what should not stand on a command line: ``-`` is standard input, ``@FILE`` a file."""

import sys
from pathlib import Path
from typing import TextIO

from broker.cli.output import Output
from broker.errors import Invalid

MAX_BYTES = 1 << 20
"""Largest text taken: a token has 8 KiB, a key set or authorization_details far less than this."""


def read_text(source: str, what: str, *, stdin: TextIO | None = None) -> str:
    """Give the text of ``-``, ``@FILE``, or the argument itself; raises Invalid when it cannot be read or is too long."""
    if source == "-":
        given = stdin or sys.stdin
        text = given.read(MAX_BYTES + 1)
    elif source.startswith("@"):
        return read_file(source[1:], what)
    else:
        text = source
    return _checked(text, what)


def read_file(name: str, what: str, *, limit: int = MAX_BYTES, as_it_is: bool = False) -> str:
    """Give the text of a file, ``-`` being standard input; raises Invalid when it is longer than ``limit`` bytes.

    ``as_it_is`` keeps the white space around it: where its hash matters.
    """
    if name == "-":
        return _checked(sys.stdin.read(limit + 1), what, limit, as_it_is=as_it_is)
    try:
        with Path(name).open("rb") as file:
            text = file.read(limit + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise Invalid(f"{what} cannot be read from {name}: {reason}", hint="name a file, or - for input") from None
    return _checked(text, what, limit, as_it_is=as_it_is)


def read_token(source: str, what: str, output: Output) -> str:
    """Read a token; one that stands on the command line itself is taken, with a warning."""
    if source != "-" and not source.startswith("@"):
        output.talk(f"note: on the command line other users can see {what}; write - or @FILE instead")
    return read_text(source, what)


def _checked(text: str, what: str, limit: int = MAX_BYTES, *, as_it_is: bool = False) -> str:
    if len(text) > limit:
        raise Invalid(f"{what} is longer than {limit} bytes")
    if not text.strip():
        raise Invalid(f"{what} is empty", hint="- reads it from standard input, @FILE from a file")
    return text if as_it_is else text.strip()
