"""Our own tokens, read back: is this one alive, as a whole?

*Alive* is the conjunction of everything that can end it: signature, time, its own row, its task and every ancestor, the
epochs of its line, the user's word and what was stopped, the policy, the workload session, the entry behind it (RFC 7662 §2.2, tokens.md 7.2). Any one of
them that fails gives the same answer, without a reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from broker.clock import Clock
from broker.errors import BrokerError, Invalid, InvalidToken
from broker.registry.entry import Entry
from broker.server.store.ports import Reader, Store
from broker.server.store.rows import TokenRow
from broker.server.tasks.admission import Starters
from broker.server.tasks.approved import judge_token
from broker.server.tasks.config import Audiences
from broker.server.tasks.exchange import TaskKeys
from broker.server.tasks.policy.asked import Action
from broker.server.tasks.policy.rules import Rules
from broker.server.tasks.standing import Standing
from broker.spiffe import SpiffeId, jose
from broker.tasks import Authority, Resource, TaskClaims, lineage_epoch, require_lineage_active, verify_task_token


@dataclass(frozen=True, slots=True)
class LiveToken:
    """A token that was alive when it was asked about."""

    claims: TaskClaims


class TaskTokens:
    """Judges tokens that this server issued."""

    def __init__(
        self,
        store: Store,
        keys: TaskKeys,
        clock: Clock,
        starters: Starters,
        audiences: Audiences,
        *,
        issuer: str,
        rules: Rules,
        standing: Standing | None = None,
    ) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._starters = starters
        self._audiences = audiences
        self._issuer = issuer
        self.rules = rules
        self.standing = standing or Standing()

    def verify(self, token: str, *, at: datetime | None = None) -> TaskClaims:
        """Check form, signature and issuer of one of our tokens, whatever its audience; raises InvalidToken.

        ``at`` is another moment than this one, for who asks which task a token was of, and not whether it is good.
        """
        audience = jose.parse_compact(token).payload.get("aud")
        if not isinstance(audience, str):
            raise InvalidToken("the token's audience is not one text", code="token_audience")
        try:
            resource = Resource(audience)
        except Invalid:
            raise InvalidToken("the token's audience is no service's", code="token_audience") from None
        now = at or self._clock.now()
        # Compared with itself: the audience is what the caller asks about, not what it is.
        verified = verify_task_token(
            token, self._keys.task_keys(), issuer=self._issuer, audience=resource, now=now, bearer=True
        )
        return verified.claims

    async def introspect(
        self, token: str, caller: SpiffeId, *, strange: Callable[[TaskClaims], None] | None = None
    ) -> LiveToken | None:
        """Give the token if it is alive and the caller may know: its own actor, or an introspector of its audience.

        ``strange`` is told of a token of ours that the caller has, and may not ask about.

        Raises:
            Unavailable: nobody can tell now.
        """
        try:
            claims = self.verify(token)
            # An audience that is registered no longer has no living tokens, not even for their own actor.
            audience = self._audiences.find(claims.aud)
            if claims.cnf is None and not audience.takes_bearer:
                return None
        except BrokerError:
            return None
        if caller != claims.client_id and caller not in audience.introspectors:
            if strange is not None:
                strange(claims)
            return None
        now = self._clock.now()
        alive = await self._store.read(lambda reader: self.is_alive(reader, claims, now))
        return LiveToken(claims) if alive else None

    def is_alive(self, reader: Reader, claims: TaskClaims, now: datetime) -> bool:
        """Tell whether a token of these claims is alive as a whole, by the rows of this moment."""
        authority, epoch = claims.authorization_details, claims.task.epoch
        return self.lives(reader, claims.jti, authority, task_id=claims.task.id, epoch=epoch, exp=claims.exp, now=now)

    def lives(
        self,
        reader: Reader,
        jti: str,
        authority: Authority,
        *,
        task_id: str,
        epoch: int,
        exp: int,
        now: datetime,
        action: Action = Action.ISSUE,
    ) -> bool:
        """Tell it of any token of ours that hangs on a task; ``authority`` and ``action`` are what the policy is asked about."""
        row = reader.token(jti)
        if row is None or row.revoked_at is not None or now.timestamp() >= exp:
            return False
        lineage = reader.lineage(row.task_id)
        if not lineage or row.task_id != task_id or epoch < lineage_epoch(lineage):
            return False
        try:
            require_lineage_active(lineage[-1], tuple(reversed(lineage[:-1])), now)
            self.standing.require_token(reader, lineage[-1].delegation, row, now)
            # What the policy of this moment would not issue is not alive, whoever holds it.
            resource, task = Resource(row.resource), lineage[-1]
            judge_token(
                reader, self.rules, task, resource=resource, authority=authority, jti=jti, now=now, action=action
            ).require()
        except BrokerError:
            return False
        return self.standing_entry(reader, row, now) is not None

    def standing_entry(self, reader: Reader, row: TokenRow, now: datetime) -> Entry | None:
        """Give the entry by which a token's workload may still act, by the same rules as at issue; None: it may not."""
        if (foreign := self._starters.foreign_entry(row.agent)) is not None:
            return foreign
        entry_ids = self._starters.entry_ids_of(row.agent)
        if row.session is not None:
            session = reader.session(row.session)
            if session is None or session.ended_at is not None:
                return None
            node = reader.node(session.agent)
            if node is None or node.banned:
                return None
            entry_ids = (session.entry_id,)
        entries = (reader.entry(entry_id) for entry_id in entry_ids)
        return next((each for each in entries if each is not None and _may_act(each, now)), None)


def _may_act(entry: Entry, now: datetime) -> bool:
    return entry.may_start_tasks and not entry.is_expired(now)
