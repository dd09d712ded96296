"""The claim ``task``: which task a token is of, and where that stands in its tree."""

from dataclasses import dataclass
from typing import Final, Self

from broker.spiffe.strictjson import JsonValue
from broker.tasks.claim_values import count, digest, invalid, own_id
from broker.tasks.task import MAX_ACT_DEPTH

MAX_EPOCH: Final = 2**53 - 1
"""Largest epoch: the largest whole number that every JSON reader keeps."""
ONCE: Final = "once"
"""What ``task.use`` says of a token for one use."""
USES: Final = frozenset({ONCE})
"""What ``task.use`` may say; absent means any number of uses within the token's life."""

_TASK_REQUIRED: Final = frozenset({"id", "root", "epoch", "hop", "purpose", "authority_hash"})
_TASK_MEMBERS: Final = _TASK_REQUIRED | {"parent", "use", "parameter_digest"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReference:
    """The claim ``task``. ``hop`` counts the agents of the chain; ``purpose`` and ``authority_hash`` are hashes.

    ``use`` restricts how often the token may be used, ``parameter_digest`` what for: the one call whose parameters have this hash.
    """

    id: str
    root: str
    parent: str | None
    epoch: int
    hop: int
    purpose: str
    authority_hash: str
    use: str | None = None
    parameter_digest: str | None = None

    def to_json(self) -> dict[str, JsonValue]:
        """Give the members that are present."""
        value: dict[str, JsonValue] = {"id": self.id}
        if self.parent is not None:
            value["parent"] = self.parent
        value |= {
            "root": self.root,
            "epoch": self.epoch,
            "hop": self.hop,
            "purpose": self.purpose,
            "authority_hash": self.authority_hash,
        }
        if self.use is not None:
            value["use"] = self.use
        if self.parameter_digest is not None:
            value["parameter_digest"] = self.parameter_digest
        return value

    @classmethod
    def parse(cls, value: JsonValue) -> Self:
        """Read the claim; raises InvalidToken for a member that is missing, not known or malformed."""
        if not isinstance(value, dict) or not value.keys() <= _TASK_MEMBERS or not value.keys() >= _TASK_REQUIRED:
            raise invalid("task lacks a member, or has one that is not known")
        use = value.get("use")
        if "use" in value and not (isinstance(use, str) and use in USES):
            raise invalid("task.use is not known")
        return cls(
            id=own_id(value["id"], "task.id"),
            root=own_id(value["root"], "task.root"),
            parent=own_id(value["parent"], "task.parent") if "parent" in value else None,
            epoch=count(value["epoch"], "task.epoch", 0, MAX_EPOCH),
            hop=count(value["hop"], "task.hop", 1, MAX_ACT_DEPTH),
            purpose=digest(value["purpose"], "task.purpose"),
            authority_hash=digest(value["authority_hash"], "task.authority_hash"),
            use=use if isinstance(use, str) else None,
            parameter_digest=(
                digest(value["parameter_digest"], "task.parameter_digest") if "parameter_digest" in value else None
            ),
        )
