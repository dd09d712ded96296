"""People who act for themselves: by a token that their issuer gave to a client which is there for that, never to an agent's.

Two things can only be done so: to leave a delegation standing, and to decide an approval. An agent holds tokens of its user; what
tells them apart is the client that a token was given to, and how long ago its user signed in.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from broker.clock import Clock
from broker.errors import BrokerError, InvalidToken, Refused
from broker.server.tasks.config import SubjectIssuer
from broker.server.tasks.subjects import LEEWAY, Subject, Subjects

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Capacity:
    """In what capacity a person comes: through which clients of an issuer, and how many seconds after the sign-in at the most.

    ``stranger`` is the refusal of another client's token.
    """

    clients: Callable[[SubjectIssuer], frozenset[str]]
    max_age: Callable[[SubjectIssuer], int]
    stranger: Callable[[], Refused]


class People:
    """Lets people of one capacity act."""

    def __init__(
        self,
        subjects: Subjects,
        clock: Clock,
        capacity: Capacity,
        refused: Callable[[BrokerError, str, str], Awaitable[None]],
    ) -> None:
        """``refused`` records a refusal: the error, the user where known, and who brought the token."""
        self._subjects = subjects
        self._clock = clock
        self._capacity = capacity
        self._refused = refused

    async def act(self, token: str, what: Callable[[Subject], Awaitable[T]], *, by: str, fresh: bool = False) -> T:
        """Do what the person of a token asks for; whatever is refused of it is on record.

        ``fresh``: only shortly after the sign-in. Raises InvalidToken, Refused, Unavailable, and what ``what`` raises.
        """
        user = ""
        try:
            subject = await self._subjects.verify(token)
            user = subject.user
            issuer = self._subjects.issuer(subject.issuer)
            if issuer is None or subject.party not in self._capacity.clients(issuer):
                raise self._capacity.stranger()
            if fresh:
                self._require_fresh(subject, self._capacity.max_age(issuer))
            return await what(subject)
        except BrokerError as error:
            await self._refused(error, user, by)
            raise

    def _require_fresh(self, subject: Subject, max_age: int) -> None:
        now = self._clock.now()
        oldest = now - timedelta(seconds=max_age)
        if subject.auth_time is None or not oldest <= subject.auth_time <= now + timedelta(seconds=LEEWAY):
            # RFC 9470: what the application asks the issuer for.
            raise Refused(
                "the user has not signed in just now",
                code="insufficient_user_authentication",
                hint=f"have the user sign in again, with max_age={max_age}",
            )
        if subject.expires_at <= now:
            raise InvalidToken("the user token has expired", code="subject_expired", hint="get a new one")
