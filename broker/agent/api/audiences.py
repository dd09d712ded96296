"""What a caller may ask for as audiences of a JWT-SVID."""

from collections.abc import Sequence
from typing import Final

from broker.errors import Invalid

MAX_AUDIENCES: Final = 64  # in one request; the standard recommends one
MAX_AUDIENCE: Final = 1024  # bytes of one


def checked_audiences(requested: Sequence[str]) -> tuple[str, ...]:
    """Give the audiences, sorted and each once; raises Invalid for none, an empty one, or too many."""
    if len(requested) > MAX_AUDIENCES:  # repetitions count: a million of them are a message of 4 MiB
        raise _too_many()
    audiences = tuple(sorted(set(requested)))
    if not audiences or audiences[0] == "":
        raise Invalid("audience must be specified", code="audience_missing")
    if any(len(one.encode()) > MAX_AUDIENCE for one in audiences):
        raise _too_many()
    return audiences


def _too_many() -> Invalid:
    return Invalid(f"at most {MAX_AUDIENCES} audiences of {MAX_AUDIENCE} bytes", code="audience_too_many")
