"""Values in the payload of a token, each read as what it was declared to be, or refused."""

from collections.abc import Mapping

from broker.errors import InvalidToken
from broker.spiffe.strictjson import JsonValue
from broker.tasks.texts import DIGEST, ID, NAME


def string(payload: Mapping[str, JsonValue], name: str) -> str:
    """Give a claim that is text; raises InvalidToken."""
    value = payload[name]
    if not isinstance(value, str):
        raise invalid(f"{name} is not text")
    return value


def named(payload: Mapping[str, JsonValue], name: str) -> str:
    """Give a claim that is short printable text; raises InvalidToken."""
    value = string(payload, name)
    if NAME.fullmatch(value) is None:
        raise invalid(f"{name} is not short printable text")
    return value


def own_id(value: JsonValue, name: str) -> str:
    """Give an id of ours; raises InvalidToken."""
    if not isinstance(value, str) or ID.fullmatch(value) is None:
        raise invalid(f"{name} is not an id")
    return value


def digest(value: JsonValue, name: str) -> str:
    """Give a hash; raises InvalidToken."""
    if not isinstance(value, str) or DIGEST.fullmatch(value) is None:
        raise invalid(f"{name} is not a hash")
    return value


def count(value: JsonValue, name: str, least: int, most: int) -> int:
    """Give a whole number of this range; raises InvalidToken."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise invalid(f"{name} is not a whole number in range")
    return value


def invalid(what: str) -> InvalidToken:
    """Give the refusal of a claim that is not as declared."""
    return InvalidToken(f"a claim of the token is not valid: {what}", code="token_claim_invalid")
