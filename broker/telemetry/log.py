"""Structured logs: an event in snake_case and key-values, on stderr.

Only keys on the allow-list are written: a token, a key or a selector value that is passed by mistake is shown as
``<withheld>``. Exceptions show their type and message, never the locals.
"""

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

import structlog

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["text", "json"]

ALLOWED = frozenset(
    {
        "event", "level", "timestamp", "logger", "exception", "address", "agent", "attempt", "attestor", "audience",
        "authority", "bundle_sequence", "cause", "code", "component", "count", "cursor", "denial", "door", "entry",
        "entries", "error", "exit_code", "expires_at", "gid", "hint", "issuer", "kind", "method", "milliseconds",
        "nearest", "path", "peer", "pid", "port", "reason", "reference", "resource", "root", "seconds", "seq", "serial", "session", "setting",
        "signal", "socket", "spiffe_id", "state", "status", "store", "task", "trust_domain", "uid", "url", "version",
    }
)  # fmt: skip
"""Keys that may be written. A new key is added here on purpose, after the question whether it can hold a secret."""

WITHHELD = "<withheld>"


def configure(level: Level = "info", format: Format | None = None) -> None:  # noqa: A002 - the setting's own name
    """Set the process's logging up, once, at start. ``format`` None: text on a terminal, JSON elsewhere."""
    chosen = format or ("text" if sys.stderr.isatty() else "json")
    renderer: Any = structlog.processors.JSONRenderer(sort_keys=True)
    if chosen == "text":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _withhold,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> Any:
    """Give a logger: ``log.info("svid_issued", entry=…, spiffe_id=…)``."""
    # Not ``logger=``: that is an argument of structlog's own.
    return structlog.get_logger(component=name)


def _withhold(logger: Any, method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    return {key: value if key in ALLOWED else WITHHELD for key, value in event.items()}
