"""YAML, written only: plain block style in which each text that could mean something else is quoted as in JSON."""

import json
import re
from collections.abc import Mapping
from typing import Final

# Nothing that YAML 1.1 or 1.2 could read as a number, a date, a truth value, an anchor or a comment.
_PLAIN: Final = re.compile(r"[A-Za-z/][A-Za-z0-9_./+-]*(?::[A-Za-z0-9_./+-]+|://[A-Za-z0-9_./+:-]+)*")
_WORDS: Final = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"})


def to_yaml(value: object) -> str:
    """Write a JSON value as one YAML document."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: object) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [line for name, member in value.items() for line in _member(_scalar(str(name)), member)]
    if isinstance(value, list) and value:
        lines = []
        for member in value:
            first, *rest = _lines(member)
            lines += [f"- {first}", *(f"  {line}" for line in rest)]
        return lines
    return [_scalar(value)]


def _member(name: str, value: object) -> list[str]:
    if isinstance(value, (Mapping, list)) and value:
        indent = "  " if isinstance(value, Mapping) else ""
        return [f"{name}:", *(indent + line for line in _lines(value))]
    return [f"{name}: {_scalar(value)}"]


def _scalar(value: object) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not value.endswith(":"):
        return value
    text = json.dumps(value, ensure_ascii=False)
    # JSON leaves in what YAML takes for a line break or refuses; and YAML knows no surrogate pairs.
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
