"""Structured logs: an event in snake_case and key-values, on stderr.

Only keys on the allow-list are written: a token, a key or a selector value that is passed by mistake is shown as
``<withheld>``. Exceptions show their type and message, never the locals.
"""

import logging
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import structlog

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["text", "json"]

_SEVERITIES = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "exception": logging.ERROR,
}

ALLOWED = frozenset(
    {
        "event", "level", "timestamp", "logger", "exception", "action", "address", "agent", "attempt", "attestor",
        "audience", "authority", "bundle_sequence", "by", "cause", "code", "component", "count", "cursor", "denial",
        "door", "entries", "entry", "error", "exit_code", "expires_at", "gained", "gid", "hint", "issuer",
        "jwt_authorities", "key_id", "kind", "lost", "method", "milliseconds", "nearest", "path", "peer", "pid",
        "policy", "port", "profile", "published", "reason", "reference", "resource", "root", "seconds", "seq",
        "sequence", "serial", "session", "sessions", "setting", "signal", "socket", "source", "spiffe_id", "state",
        "status", "stopped", "store", "task", "tasks", "tasks_ended", "tasks_resumed", "tasks_suspended",
        "tokens_revoked", "transmitter", "trust_domain", "uid", "until", "url", "version", "wanted",
        "x509_authorities",
    }
)  # fmt: skip
"""Keys that may be written. A new key is added here on purpose, after the question whether it can hold a secret."""

WITHHELD = "<withheld>"


@dataclass(slots=True)
class LogLevels:
    """What is written, by the severities of ``logging``: less than ``current`` is not. Both can be read at any time."""

    at_start: int = logging.INFO
    current: int = logging.INFO


LEVELS = LogLevels()
"""Of this process: logging is one for all of it."""


def configure(level: Level = "info", format: Format | None = None) -> None:  # noqa: A002 - the setting's own name
    """Set the process's logging up, once, at start. ``format`` None: text on a terminal, JSON elsewhere."""
    chosen = format or ("text" if sys.stderr.isatty() else "json")
    renderer: Any = structlog.processors.JSONRenderer(sort_keys=True)
    if chosen == "text":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    LEVELS.at_start = LEVELS.current = getattr(logging, level.upper())
    structlog.configure(
        processors=[
            _drop_below_level,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _withhold,
            renderer,
        ],
        # Everything comes to the first processor: the level may change while the process runs.
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> Any:
    """Give a logger: ``log.info("svid_issued", entry=…, spiffe_id=…)``."""
    # Not ``logger=``: that is an argument of structlog's own.
    return structlog.get_logger(component=name)


def _drop_below_level(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if _SEVERITIES.get(method, logging.CRITICAL) < LEVELS.current:
        raise structlog.DropEvent
    return event


def _withhold(logger: Any, method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    return {key: value if key in ALLOWED else WITHHELD for key, value in event.items()}
