"""Tokens that a process keeps for its next calls: each with what ends it, and only so many.

What is kept never outlives what the broker says: a token of which anything ended is dropped when the feed tells it
(:mod:`broker.sdk.watching`), and one of which nothing was heard for a while is asked for anew. Asks nobody itself.
"""

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final, Protocol, Self, TypeAlias

from broker._proto.broker.server.v1 import tasks_pb2
from broker.clock import Clock
from broker.errors import InvalidToken, Refused
from broker.sdk.feed import PARTITIONED_AFTER, STALE_AFTER, FeedState
from broker.tasks import TaskClaims
from broker.tasks.verify import unverified_claims

RENEW_BEFORE: Final = 20.0
"""Seconds before expiry at which a kept token is asked for anew: more than any leeway, less than any life."""
HEARD_WITHIN: Final = STALE_AFTER
"""Seconds since the broker's last word on a token until which it is given out without asking."""
TRUSTED_FOR: Final = PARTITIONED_AFTER
"""Seconds since that word until which it is given out where the broker cannot be asked: as long as a verifier may accept it."""
MOST_KEPT: Final = 64
"""Tokens of one task, some kilobytes each: a task has few resources, and what is dropped is asked for again."""

Name: TypeAlias = tuple[str, str, str, str]
"""What a token was asked for with: resource, scope, authorization details as JSON, thumbprint of the key that proves it."""


@dataclass(frozen=True, slots=True)
class KeptToken:
    """One token. ``repr`` shows it not."""

    text: str = field(repr=False)
    expires_at: int
    claims: TaskClaims
    kid: str | None
    asked_at: float
    """When it was asked for, by the monotonic clock: what ended before that, the broker knew."""
    names: frozenset[str]
    """All by whose end it ends, as frames name it, but for its key and itself."""

    @classmethod
    def of(cls, issued: tasks_pb2.IssuedToken, asked_at: float) -> Self | None:
        """Read one's own new token; None for one that serves once, and where a newer broker wrote it so that nobody here could tell by what it ends."""
        try:
            kid, claims = unverified_claims(issued.access_token)
        except InvalidToken:
            return None
        if claims.task.use is not None:
            return None
        session = None if claims.cnf is None else claims.cnf.session
        names = {claims.task.id, claims.task.root, claims.sub, str(claims.client_id), claims.aud.text, session or ""}
        return cls(issued.access_token, issued.expires_at, claims, kid, asked_at, frozenset(names - {""}))

    def is_dead(self, feed: FeedState, kids: frozenset[str]) -> bool:
        """Say whether anything that the feed has told ends it; ``kids`` are the keys that count now, none where nobody told."""
        try:
            feed.require_good(self.claims)
        except Refused:
            return True
        return bool(kids) and self.kid not in kids


class Watching(Protocol):
    """What was heard of tokens; :class:`broker.sdk.watching.TokenWatch` is one."""

    def silence(self, token: KeptToken) -> float:
        """Give the seconds since something was heard that would have told of this token's end."""

    def is_dead(self, token: KeptToken) -> bool:
        """Say whether something was heard that ends this token."""


class KeptTokens:
    """Those of one task."""

    def __init__(
        self, watch: Watching, clock: Clock, *, about: AbstractSet[str], leaf: Callable[[], str | None]
    ) -> None:
        """``about`` is of what all of them are, ``leaf`` gives the thumbprint of the certificate that this process has now."""
        self._watch = watch
        self._clock = clock
        self._about = about
        self._leaf = leaf
        self._kept: dict[Name, KeptToken] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def names(self) -> frozenset[str]:
        """All by whose end a token ends, as the feed names it."""
        return frozenset(self._about).union(*(one.names for one in self._kept.values()))

    def keep(self, name: Name, token: KeptToken) -> bool:
        """Keep one in place of the one before; false: it has ended already. Of too many the longest kept makes room."""
        if self._watch.is_dead(token):
            return False
        self._kept.pop(name, None)
        self._kept[name] = token
        if len(self._kept) > MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        return True

    def current(self, name: Name) -> str | None:
        """Give the one that was asked for so, if it is as good as a new one."""
        kept = self._kept.get(name)
        return kept.text if kept is not None and self._is_current(kept) else None

    def working(self, name: Name) -> str | None:
        """Give it if it still works: by its session also under the certificate that came after its own."""
        kept = self._kept.get(name)
        if kept is None or kept.expires_at <= self._clock.now().timestamp() or self._silence(kept) > TRUSTED_FOR:
            return None
        cnf = kept.claims.cnf
        return kept.text if self._is_held(kept) or (cnf is not None and cnf.session is not None) else None

    def is_current(self, text: str) -> bool:
        """Say whether this text is a token that is kept, and as good as a new one."""
        return any(one.text == text and self._is_current(one) for one in self._kept.values())

    def drop_ended(self) -> None:
        """Drop what has ended."""
        self._drop(self._watch.is_dead)

    def forget(self, text: str) -> None:
        """Drop the one that is this text."""
        self._drop(lambda one: one.text == text)

    def refused(self, name: Name, *, is_all: bool) -> None:
        """Drop the one that was asked for so, and was denied; or all, where it was not for what was asked."""
        self._kept.pop(name, None)
        if is_all:
            self.clear()

    def clear(self) -> None:
        """Drop all."""
        self._kept.clear()

    def _drop(self, is_meant: Callable[[KeptToken], bool]) -> None:
        for name in [name for name, one in self._kept.items() if is_meant(one)]:
            del self._kept[name]

    def _is_current(self, kept: KeptToken) -> bool:
        is_fresh = kept.expires_at - self._clock.now().timestamp() > RENEW_BEFORE
        return is_fresh and self._is_held(kept) and self._silence(kept) <= HEARD_WITHIN

    def _is_held(self, kept: KeptToken) -> bool:
        cnf = kept.claims.cnf
        return cnf is None or cnf.x5t is None or cnf.x5t == self._leaf()

    def _silence(self, kept: KeptToken) -> float:
        """Give the seconds since the broker's last word that a token is alive: its issue was one."""
        return min(self._clock.monotonic() - kept.asked_at, self._watch.silence(kept))
