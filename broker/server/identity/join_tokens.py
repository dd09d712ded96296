"""Join tokens: one-time secrets that admit one node each. Stored as hashes only; the text is shown once."""

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.clock import Clock
from broker.errors import Invalid
from broker.server.store.ports import Store, Writer
from broker.spiffe import SpiffeId, TrustDomain

DEFAULT_TTL: Final = timedelta(seconds=600)
"""As in SPIRE: long enough to paste it on another machine."""
MAX_TTL: Final = timedelta(days=7)
"""A longer one would be a standing secret."""
TOKEN_BYTES: Final = 24
"""192 random bits: nobody finds one by trying."""
HANDLE_CHARACTERS: Final = 32
"""Of the hash, in the agent's SPIFFE ID: 128 bits keep two tokens apart."""

_CHOSEN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{15,255}")


@dataclass(frozen=True, slots=True)
class IssuedJoinToken:
    """A join token at the only moment when its text is known."""

    value: str = field(repr=False)
    expires_at: datetime


class JoinTokens:
    """Makes join tokens; they are used up by :mod:`broker.server.identity.admission`."""

    def __init__(self, store: Store, clock: Clock, trust_domain: TrustDomain) -> None:
        self._store = store
        self._clock = clock
        self._trust_domain = trust_domain

    async def create(
        self, actor: str, *, ttl: timedelta | None = None, chosen: str = "", agent_id: SpiffeId | None = None
    ) -> IssuedJoinToken:
        """Make one; ``agent_id`` is an extra identity for the node. Raises Invalid, or Conflict for a chosen one in use."""
        life = DEFAULT_TTL if ttl is None else ttl
        if not timedelta(0) < life <= MAX_TTL:
            raise Invalid(f"a join token lives at most {MAX_TTL.days} days", code="invalid_ttl")
        if chosen and _CHOSEN.fullmatch(chosen) is None:
            raise Invalid(
                "a join token has 16 to 256 letters, digits and -._",
                code="weak_join_token",
                hint="leave it out, and the server chooses a good one",
            )
        if agent_id is not None:
            self._check_alias(agent_id)
        value = chosen or secrets.token_hex(TOKEN_BYTES)
        token_hash = join_token_hash(value)
        now = self._clock.now()
        expires_at = now.replace(microsecond=0) + life

        def act(writer: Writer) -> None:
            writer.add_join_token(token_hash, agent_id, expires_at)
            fields: dict[str, FieldValue] = {
                "token_hash": token_hash,
                "expires_at": int(expires_at.timestamp()),
                "spiffe_id": None if agent_id is None else str(agent_id),
            }
            writer.record(Record(Event.JOIN_TOKEN_CREATED, now, actor, token_hash, fields))

        await self._store.write(act)
        return IssuedJoinToken(value, expires_at)

    def _check_alias(self, agent_id: SpiffeId) -> None:
        if agent_id.trust_domain != self._trust_domain or agent_id.path in {"", "/spire"}:
            raise Invalid("the agent's extra identity is not in the server's trust domain", code="invalid_agent_id")
        if agent_id.path.startswith("/spire/"):
            raise Invalid("IDs under /spire belong to the server and its agents", code="invalid_agent_id")


def join_token_hash(token: str) -> str:
    """Give the name under which a join token is stored: hex SHA-256 of its text."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def handle_of(token: str) -> str:
    """Give what names a join token in an agent's SPIFFE ID and in records: the first half of its hash."""
    return join_token_hash(token)[:HANDLE_CHARACTERS]
