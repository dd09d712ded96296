"""What the verbs of ``broker task`` show of a task: of many, and of one that was asked for by its id."""

from typing import Any, Final

from broker.cli.output import Column, Shape, moment

STATES: Final = ("pending", "active", "suspended", "completed", "revoked", "expired", "superseded", "cascaded")

SHAPE: Final = Shape(
    "task",
    "tasks",
    (
        Column("id", "id"),
        Column("state", "state"),
        Column("user", "user"),
        Column("agent", "agent"),
        Column("purpose", "purpose"),
        Column("expires", "expires_at"),
        Column("cause", "cause"),
        Column("supervision", "supervision", wide=True),
        Column("lease", "lease_ttl", wide=True),
        Column("left", "lease_left", wide=True),
        Column("root", "root", wide=True),
        Column("parent", "parent", wide=True),
        Column("supersedes", "supersedes", wide=True),
        Column("version", "version", wide=True),
        Column("tokens", "tokens_issued", wide=True),
        Column("ended", "ended_at", wide=True),
        Column("authority", "authorization_details", wide=True),
    ),
)
ONE: Final = Shape(
    SHAPE.kind,
    SHAPE.plural,
    (
        *SHAPE.columns,
        Column("on behalf", "act", wide=True),
        Column("children", "children", wide=True),
        Column("resumes", "resumes", wide=True),
        Column("told", "revocation", wide=True),
    ),
)
"""One task, asked for by its id: only then the server counts and looks up."""
TREE: Final = Shape(SHAPE.kind, SHAPE.plural, (Column("task", "tree"), *SHAPE.columns[1:]))


def row(task: Any) -> dict[str, Any]:
    """Give a task's members, as they are known of each."""
    return {
        "id": task.id,
        "root": task.root,
        "parent": task.parent,
        "depth": task.depth,
        "user": task.user,
        "agent": task.agent,
        "purpose": task.purpose,
        "authorization_details": parsed(task.authorization_details),
        "state": task.state,
        "version": task.version,
        "cause": task.cause,
        "supersedes": task.supersedes,
        "supervision": task.supervision,
        "lease_ttl": task.lease_ttl or None,
        "lease_left": round(task.lease_left, 1) if task.lease_ttl else None,
        "created_at": moment(task.created_at),
        "expires_at": moment(task.expires_at),
        "ended_at": moment(task.ended_at),
        "tokens_issued": task.tokens_issued,
    }


def full_row(task: Any) -> dict[str, Any]:
    """Give a task's members, as they are known of one that was asked for by its id."""
    return row(task) | {
        "act": list(task.act),
        "children": task.children,
        "resumes": task.resumes,
        "revocation": revocation(task),
    }


def revocation(task: Any) -> dict[str, Any] | None:
    """Say how far the end or the suspension has come; None where there is nothing to tell."""
    if not task.HasField("revocation"):
        return None
    told = task.revocation
    return {"state": told.state, "expected": told.expected, "acked": told.acked, "max_ms": told.max_ms}


def parsed(details: str) -> Any:
    """Read authorization details that the server or our own parser wrote."""
    from broker.spiffe import strictjson  # noqa: PLC0415 - imports cryptography

    return strictjson.loads(details.encode()) if details else []
