"""A running task: its tokens, the tasks below it, and what becomes of it. When its block is left every token of it dies.

Tokens are bound to this process: to its X.509-SVID and its workload session, or to a key for proofs. They are kept until shortly
before they expire or until the SVID rotates, then asked for anew; there is nothing to refresh by hand. What ends one, or its task,
or its user's session, is heard at once, and drops it: the next call asks, and is refused or given another. While nobody can give a
new one, a token that names the session goes on for a while: the new certificate holds it, too. While the block lasts the task is
kept alive in the background: its supervision is the server's default, ``attached`` (this process holds a stream), or ``lease`` (it
sends a heartbeat).
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.broker.server.v1 import tasks_pb2 as server_pb2
from broker.clock import Clock
from broker.errors import BrokerError, PolicyDenied, Refused, Unavailable
from broker.sdk.keeping import Keeper
from broker.sdk.kept import KeptToken, KeptTokens, Name
from broker.sdk.task_calls import asked, canonical, chosen, tasks_api
from broker.spiffe import SpiffeId
from broker.tasks import Authority, Resource
from broker.tasks.verify import unverified_confirmation

if TYPE_CHECKING:
    from broker.sdk.dpop import ProofKey
    from broker.sdk.http import HttpClient
    from broker.sdk.workload import Workload

CONFIRM_SECONDS = 2.0
"""How long the broker may take where there is a token to go on with: a call of the program waits for it."""

ASK_AGAIN = 1.0
"""Seconds after an attempt in vain in which a kept token is given out without another."""

ROTATION_SECONDS = 5.0
"""How long a token may be ahead of the SVID stream when both rotate."""


class Task:
    """A running task. Made by entering the block of :meth:`broker.sdk.Workload.task`."""

    def __init__(self, workload: "Workload", state: server_pb2.Task, *, clock: Clock) -> None:
        """Hold the started task."""
        self._workload = workload
        self._state = state
        self._clock = clock
        self._api = tasks_api(workload)
        self._asking = asyncio.Lock()
        self.keeper = Keeper(workload.channel, state, chosen(workload))
        """Keeps the task alive while this process works on it."""
        self.authority = Authority.parse(state.authorization_details)
        resources = (each.text for each in self.authority.resources())
        self._kept = KeptTokens(
            workload.watch,
            clock,
            about={self.id, self.root, self.user, self.agent, *resources},
            leaf=lambda: None if workload.current is None else workload.current.x5t,
        )
        self._away_until = 0.0

    @property
    def id(self) -> str:
        """The task's id."""
        return self._state.id

    @property
    def root(self) -> str:
        """The id of the task at the top of its tree: its own unless it was derived."""
        return self._state.root or self._state.id

    @property
    def user(self) -> str:
        """On whose behalf it acts."""
        return self._state.user

    @property
    def state(self) -> str:
        """The state as last told by the server."""
        return self._state.state

    @property
    def agent(self) -> str:
        """The SPIFFE ID that acts."""
        return self._state.agent

    @property
    def created_at(self) -> int:
        """The start, in seconds since 1970."""
        return self._state.created_at

    @property
    def version(self) -> int:
        """The version as last told by the server: what a change may name as the one it expects."""
        return self._state.version

    @property
    def expires_at(self) -> int:
        """The end at the latest, in seconds since 1970."""
        return self._state.expires_at

    @property
    def names(self) -> frozenset[str]:
        """All by whose end tokens of this task end, as the feed names it."""
        return self._kept.names

    async def token(
        self,
        resource: str,
        *,
        scope: str = "",
        authorization_details: Sequence[Mapping[str, object]] | None = None,
        key: "ProofKey | None" = None,
        user_token: str = "",
    ) -> str:
        """Give a token for this resource, bound to this process, or with ``key`` to that key (RFC 9449).

        ``user_token`` is a newer token of the task's user: it confirms their session, where the server waits for that, and lets the
        task go on that was suspended because it did not come.

        Raises:
            Refused: the task has ended, or its authority does not reach that far.
            Unavailable: agent or server cannot answer now.
        """
        wanted = canonical(authorization_details) if authorization_details else ""
        name = (Resource(resource).text, scope, wanted, "" if key is None else key.jkt)
        async with self._asking:
            if self.keeper.lost is not None or user_token:
                # What was kept is dead, or may be: the server says whether there is another.
                self._kept.clear()
            if (kept := self._kept.current(name)) is not None:
                return kept
            try:
                return await self._fetched(name, user_token)
            except Unavailable:
                # Not what was kept before it was asked: meanwhile that may have ended, and was dropped.
                if (kept := self._kept.working(name)) is None:
                    raise
                return kept
            except BrokerError as error:
                # What the broker denies is given out no more, also where it cannot be asked the next time.
                self._kept.refused(name, is_all=isinstance(error, Refused) and not isinstance(error, PolicyDenied))
                raise

    def forget(self, token: str) -> None:
        """Keep a token no longer: a service refused it. It may be dead while the task lives, which was suspended and goes on."""
        self._kept.forget(token)

    def is_kept(self, token: str) -> bool:
        """Say whether :meth:`token` would give this token again, and ask nobody for it."""
        return self.keeper.lost is None and self._kept.is_current(token)

    def let_go(self) -> None:
        """Keep no token, and listen for none."""
        self._kept.clear()
        self._workload.watch.leave(self._kept)

    async def _fetched(self, name: Name, user_token: str) -> str:
        """Ask for a token, keep it, give it; once more where it ended on the way: then there is another, or the reason why not."""
        text, is_alive = await self._asked_for(name, user_token)
        return text if is_alive else (await self._asked_for(name, user_token))[0]

    async def _asked_for(self, name: Name, user_token: str) -> tuple[str, bool]:
        now = self._clock.monotonic()
        issued = await self._issue(name, user_token, now)
        if self.keeper.lost is not None:
            # It goes on: somebody has let it.
            await self._keep()
        await self._settle(issued)
        token = KeptToken.of(issued, now)
        is_alive = token is None or self._kept.keep(name, token)
        if token is not None and is_alive:
            self._workload.watch.follow(self._kept)
        return issued.access_token, is_alive

    def _request(
        self, resource: str, scope: str, details: str, jkt: str, user_token: str
    ) -> tasks_pb2.IssueTokenRequest:
        return tasks_pb2.IssueTokenRequest(
            task_id=self.id,
            spiffe_id=chosen(self._workload),
            resource=resource,
            scope=scope,
            authorization_details=details,
            idempotency_key=secrets.token_urlsafe(16),
            jkt=jkt,
            user_token=user_token,
        )

    def resource_of(self, url: str) -> str:
        """Find the task's resource that holds this URL: the longest of its locations that contains it.

        Raises:
            PolicyDenied: none of the task's locations contains it.
        """
        target = Resource(url.split("?", 1)[0].split("#", 1)[0])
        holding = [r for r in self.authority.resources() if r.contains(target)]
        if not holding:
            raise PolicyDenied(
                f"no location of this task contains {target.text}",
                code="invalid_target",
                hint="name it in authorization_details when the task starts",
            )
        return max(holding, key=lambda r: len(r.text)).text

    def http(self, **options: Any) -> "HttpClient":
        """Give an httpx2 client: mTLS with this process's SVID, and the right token on each request.

        ``key``, a :class:`broker.sdk.dpop.ProofKey`, binds the tokens to it and proves it with each request.
        """
        from broker.sdk.http import http_client  # noqa: PLC0415 - httpx2 is an extra

        return http_client(self._workload, self, **options)

    async def complete(self) -> None:
        """End the task now. Ending twice is fine."""
        request = tasks_pb2.CompleteTaskRequest(
            task_id=self.id, spiffe_id=chosen(self._workload), idempotency_key=f"complete-{self.id}"
        )
        self._state = await self._call("CompleteTask", request)
        self._kept.clear()

    async def child(
        self,
        agent: SpiffeId | str,
        *,
        purpose: str,
        authorization_details: Sequence[Mapping[str, object]],
        ttl: int = 0,
        supervision: str = "",
        idempotency_key: str = "",
    ) -> str:
        """Start a task below this one for another workload, within this one's authority; give its id.

        That workload takes it up by :meth:`broker.sdk.Workload.attach` and fetches its own tokens: none passes through here.

        Raises:
            PolicyDenied: the authority goes beyond this task's, or the chain is too long, or the agent is in it already.
            Refused: this task, or one above it, is not active.
        """
        request = tasks_pb2.StartChildTaskRequest(
            spiffe_id=chosen(self._workload),
            parent=self.id,
            agent=str(agent),
            purpose=purpose,
            authorization_details=canonical(authorization_details),
            ttl=ttl,
            supervision=supervision,
            idempotency_key=idempotency_key or secrets.token_urlsafe(16),
        )
        child: server_pb2.Task = await self._call("StartChildTask", request)
        return child.id

    async def suspend(self) -> None:
        """Stop for a while: every token of the task and of those below it dies, and none is issued. Twice is fine."""
        await self._change("suspend")
        await self.keeper.stop()

    async def resume(self) -> None:
        """Go on after :meth:`suspend`: tokens are asked for anew.

        Raises:
            Conflict: the task is not suspended.
            Refused: somebody else suspended it, or it was resumed too often.
        """
        await self._change("resume")
        await self._keep()

    async def handoff(self, agent: SpiffeId | str) -> str:
        """Give the work to another workload and stop; give the id of its task, which it takes up by ``attach``.

        This task ends, and those below it.
        """
        changed = await self._change("handoff", to=str(agent))
        await self.keeper.stop()
        return changed.successor.id

    async def _keep(self) -> None:
        await self.keeper.stop()
        self.keeper = Keeper(self._workload.channel, self._state, chosen(self._workload))
        await self.keeper.start()

    async def _change(self, operation: str, *, to: str = "") -> server_pb2.ChangedTask:
        request = tasks_pb2.ChangeTaskRequest(
            spiffe_id=chosen(self._workload),
            task_id=self.id,
            operation=operation,
            to=to,
            idempotency_key=secrets.token_urlsafe(16),
        )
        changed: server_pb2.ChangedTask = await self._call("ChangeTask", request)
        self._state = changed.task
        self._kept.clear()
        return changed

    async def _settle(self, issued: server_pb2.IssuedToken) -> None:
        """Wait until this process holds the certificate that the token is bound to."""
        cnf = unverified_confirmation(issued.access_token)
        current = self._workload.current
        if cnf is not None and cnf.x5t is not None and (current is None or current.x5t != cnf.x5t):
            await self._workload.wait_for_x5t(cnf.x5t, timeout=ROTATION_SECONDS)

    async def _issue(self, name: Name, user_token: str, now: float) -> server_pb2.IssuedToken:
        """Ask; only for a moment, and not each time in vain, where there is a token to go on with."""
        request = self._request(*name, user_token)
        can_go_on = self._kept.working(name) is not None
        if can_go_on and now < self._away_until:
            raise Unavailable("the broker could not be asked a moment ago", code="asked_in_vain")
        try:
            # The same key twice: if the first one was committed, this gives the same token and is charged once.
            issued: server_pb2.IssuedToken = await (
                asked(self._api, "IssueToken", request, seconds=CONFIRM_SECONDS)
                if can_go_on
                else self._call("IssueToken", request)
            )
        except Unavailable:
            self._away_until = self._clock.monotonic() + ASK_AGAIN
            raise
        return issued

    async def _call(self, method: str, request: object) -> Any:
        """Ask, and once more where nobody answered: every request bears a key under which it is done once."""
        try:
            return await asked(self._api, method, request)
        except Unavailable:
            return await asked(self._api, method, request)
