"""Repeated requests: the same key with the same request gets the same answer, with another request a refusal.

What is kept is a task's id or a token's claims, never a token. A kept answer that is of no more use is refused rather than
given anew: the caller chose the key, and may choose another.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final, Protocol

from broker.errors import Conflict
from broker.server.store.ports import Writer
from broker.server.tasks.records import sha256
from broker.spiffe import jose, strictjson
from broker.spiffe.strictjson import JsonValue

KEPT: Final = timedelta(hours=1)
"""How long an answer is kept: longer than any client goes on trying."""


class Answers:
    """The answers kept under one caller's key, within one transaction."""

    def __init__(self, writer: Writer, *, owner: str, key: str, digest: str, now: datetime) -> None:
        """``digest`` is of the request, see :func:`digest_of`; an empty key keeps nothing."""
        self._writer = writer
        self._owner = owner
        self._key = key
        self._digest = digest
        self.now = now

    def recall(self) -> str | None:
        """Give the kept answer, or None; Conflict(code="idempotency_mismatch") for another request under the key."""
        return self._writer.recall(self._owner, self._key, self._digest) if self._key else None

    def keep(self, answer: str) -> None:
        """Keep the answer."""
        if self._key:
            self._writer.remember(self._owner, self._key, self._digest, answer, self.now + KEPT)

    def recall_claims(self) -> Mapping[str, JsonValue] | None:
        """Give a kept token's claims if the token is still good; Conflict(code="idempotency_spent") if it is not."""
        kept = self.recall()
        if kept is None:
            return None
        payload = strictjson.loads(kept.encode())
        assert isinstance(payload, dict)
        expires_at = jose.numeric_date(payload, "exp", required=True)
        jti = payload["jti"]
        row = self._writer.token(jti) if isinstance(jti, str) else None
        if row is None or row.revoked_at is not None or self.now.timestamp() >= expires_at:
            raise spent()
        return payload


class _Presented(Protocol):
    """A user's word, known by its hash."""

    @property
    def token_hash(self) -> str: ...


def digest_of(what: str, subject: _Presented | None, *parts: str | int | None) -> str:
    """Give the digest of a request: its kind, the user's token, and every part that shapes the answer."""
    return sha256(strictjson.canonical([what, None if subject is None else subject.token_hash, *parts]))


def spent() -> Conflict:
    """Give the refusal of an answer that is of no more use."""
    return Conflict(
        "the answer under this idempotency key is over", code="idempotency_spent", hint="ask again with a new key"
    )
