"""The constraints of an authorization detail: which there are, what a value looks like, and when one is narrower.

A closed set: a constraint that nobody here knows is refused, because nobody could tell whether it was widened. Amounts
are exact decimals written as strings; no number with a fraction is read. Counting calls or money is not done here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from broker.errors import Invalid
from broker.spiffe.strictjson import MAX_EXACT, JsonValue

MAX_VALUES: Final = 64
"""Most values of one list: a list is compared value by value, and travels in every token."""
MAX_TEXT: Final = 256
"""Longest single value, in characters."""
MAX_AMOUNT_DIGITS: Final = 20
"""Most digits before the point: no currency needs more, and the token stays small."""

_AMOUNT: Final = re.compile(r"(?:0|[1-9][0-9]{0,19})(?:\.[0-9]{1,18})?")
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_TEXT: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of constraint: ``read`` checks a value and gives its one form, ``within`` compares two such forms."""

    read: Callable[[JsonValue], JsonValue]
    within: Callable[[JsonValue, JsonValue], bool]
    is_metered: bool = False
    """Whether it counts over several calls, so that an issuer without a counter must refuse it."""


def read_constraints(value: JsonValue) -> dict[str, JsonValue]:
    """Check a ``constraints`` object and give it in one form, names sorted; raises Invalid."""
    if not isinstance(value, dict) or not value:
        raise invalid("constraints is not an object with members")
    constraints: dict[str, JsonValue] = {}
    for name in sorted(value):
        kind = KINDS.get(name)
        if kind is None:
            raise invalid("a constraint is not known", hint=f"known are {', '.join(sorted(KINDS))}")
        constraints[name] = kind.read(value[name])
    return constraints


def is_within(child: Mapping[str, JsonValue], parent: Mapping[str, JsonValue]) -> bool:
    """Tell whether every constraint of the parent is in the child, and no broader there. More may be in the child."""
    return all(name in child and KINDS[name].within(child[name], limit) for name, limit in parent.items())


def read_texts(value: JsonValue, what: str) -> tuple[str, ...]:
    """Check a non-empty list of short printable texts; gives them sorted, each once. Raises Invalid."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_VALUES:
        raise invalid(f"{what} is not a list of 1 to {MAX_VALUES} texts")
    return tuple(sorted({read_text(item, what) for item in value}))


def read_text(value: JsonValue, what: str) -> str:
    """Check one short printable text; raises Invalid."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or _TEXT.fullmatch(value) is None:
        raise invalid(f"{what} is not 1 to {MAX_TEXT} printable ASCII characters")
    return value


def invalid(what: str, hint: str = "") -> Invalid:
    """Make the error for authorization details that cannot be read (RFC 9396 §5)."""
    return Invalid(f"the authorization details are not valid: {what}", code="invalid_authorization_details", hint=hint)


def _read_list(value: JsonValue) -> JsonValue:
    return list(read_texts(value, "a constraint"))


def _read_one(value: JsonValue) -> JsonValue:
    return read_text(value, "a constraint")


def _read_amount(value: JsonValue) -> JsonValue:
    amount, currency = _members(value, "amount", "currency")
    # A string, exactly: a JSON number may have been rounded before it came here.
    if not isinstance(amount, str) or _AMOUNT.fullmatch(amount) is None:
        raise invalid("an amount is not a decimal string such as 500.00")
    if not isinstance(currency, str) or _CURRENCY.fullmatch(currency) is None:
        raise invalid("a currency is not three capital letters")
    return {"amount": amount, "currency": currency}


def _read_calls(value: JsonValue) -> JsonValue:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_VALUES:
        raise invalid(f"max_calls is not a list of 1 to {MAX_VALUES} objects")
    counts: dict[str, int] = {}
    for item in value:
        call_class, count = _members(item, "call_class", "count")
        name = read_text(call_class, "a call class")
        if name in counts:
            raise invalid("a call class is limited twice")
        counts[name] = _whole(count)
    return [{"call_class": name, "count": counts[name]} for name in sorted(counts)]


def _read_window(value: JsonValue) -> JsonValue:
    after, before = (_whole(member) for member in _members(value, "not_before", "not_after"))
    if before <= after:
        raise invalid("a time window is empty")
    return {"not_before": after, "not_after": before}


def _members(value: JsonValue, *names: str) -> list[JsonValue]:
    if not isinstance(value, dict) or value.keys() != set(names):
        raise invalid(f"a constraint does not have exactly the members {' and '.join(names)}")
    return [value[name] for name in names]


def _whole(value: JsonValue) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_EXACT:
        raise invalid("a count or time is not a whole number from zero")
    return value


def _is_equal(child: JsonValue, parent: JsonValue) -> bool:
    return child == parent


def _is_subset(child: JsonValue, parent: JsonValue) -> bool:
    return isinstance(child, list) and isinstance(parent, list) and all(item in parent for item in child)


def _is_no_more_money(child: JsonValue, parent: JsonValue) -> bool:
    assert isinstance(child, dict)
    assert isinstance(parent, dict)
    return child["currency"] == parent["currency"] and Decimal(str(child["amount"])) <= Decimal(str(parent["amount"]))


def _are_no_more_calls(child: JsonValue, parent: JsonValue) -> bool:
    ours, limits = _counts(child), _counts(parent)
    return all(name in ours and ours[name] <= limit for name, limit in limits.items())


def _counts(value: JsonValue) -> dict[str, int]:
    assert isinstance(value, list)
    return dict(_count(item) for item in value)


def _count(item: JsonValue) -> tuple[str, int]:
    assert isinstance(item, dict)
    name, count = item["call_class"], item["count"]
    assert isinstance(name, str)
    assert isinstance(count, int)
    return name, count


def _is_inside_window(child: JsonValue, parent: JsonValue) -> bool:
    assert isinstance(child, dict)
    assert isinstance(parent, dict)
    return _whole(child["not_before"]) >= _whole(parent["not_before"]) and _whole(child["not_after"]) <= _whole(
        parent["not_after"]
    )


KINDS: Final[Mapping[str, Kind]] = {
    "allowed_tools": Kind(_read_list, _is_subset),
    "data_classification": Kind(_read_list, _is_subset),
    "max_amount": Kind(_read_amount, _is_no_more_money),
    "max_calls": Kind(_read_calls, _are_no_more_calls, is_metered=True),
    "recipient_domain": Kind(_read_list, _is_subset),
    "tenant": Kind(_read_one, _is_equal),
    "time_window": Kind(_read_window, _is_inside_window),
}
"""Every constraint that can be asked for. Another one needs a line here before anybody may send it."""
