"""A running task: its tokens, the tasks below it, and what becomes of it. When its block is left every token of it dies.

Tokens are bound to this process: to its X.509-SVID and its workload session, or to a key for proofs. They are kept until shortly
before they expire or until the SVID rotates, then asked for anew; there is nothing to refresh by hand. While nobody can give a
new one, a token that names the session goes on: the new certificate holds it, too. While the block lasts the task is kept alive
in the background: its supervision is the server's default, ``attached`` (this process holds a stream), or ``lease`` (it sends a
heartbeat).
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.broker.server.v1 import tasks_pb2 as server_pb2
from broker.clock import Clock
from broker.errors import PolicyDenied, Unavailable
from broker.sdk.keeping import Keeper
from broker.sdk.task_calls import asked, canonical, chosen, tasks_api
from broker.spiffe import SpiffeId
from broker.tasks import Authority, Confirmation, Resource
from broker.tasks.verify import unverified_confirmation

if TYPE_CHECKING:
    from broker.sdk.dpop import ProofKey
    from broker.sdk.http import HttpClient
    from broker.sdk.workload import Workload

RENEW_BEFORE = 20.0
"""Seconds before expiry at which a kept token is asked for anew: more than any leeway, less than any life."""

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
        self._kept: dict[tuple[str, str, str, str], tuple[server_pb2.IssuedToken, Confirmation | None]] = {}
        self._asking = asyncio.Lock()
        self.keeper = Keeper(workload.channel, state, chosen(workload))
        """Keeps the task alive while this process works on it."""
        self.authority = Authority.parse(state.authorization_details)

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
            kept = self._kept.get(name)
            if kept is not None and self._is_current(*kept) and not user_token:
                return kept[0].access_token
            try:
                issued = await self._issue(self._request(*name, user_token))
            except Unavailable:
                if kept is None or not self._is_good(*kept):
                    raise
                return kept[0].access_token
            if self.keeper.lost is not None:
                # It goes on: somebody has let it.
                await self._keep()
            self._kept[name] = (issued, await self._settle(issued))
            return issued.access_token

    def forget(self, token: str) -> None:
        """Keep a token no longer: a service refused it. It may be dead while the task lives, which was suspended and goes on."""
        for name in [name for name, (issued, _) in self._kept.items() if issued.access_token == token]:
            del self._kept[name]

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

    async def _settle(self, issued: server_pb2.IssuedToken) -> Confirmation | None:
        """Wait until this process holds the certificate that the token is bound to; give what it is bound to."""
        cnf = unverified_confirmation(issued.access_token)
        current = self._workload.current
        if cnf is not None and cnf.x5t is not None and (current is None or current.x5t != cnf.x5t):
            await self._workload.wait_for_x5t(cnf.x5t, timeout=ROTATION_SECONDS)
        return cnf

    def _is_current(self, issued: server_pb2.IssuedToken, cnf: Confirmation | None) -> bool:
        """Tell whether a kept token is as good as a new one."""
        current = self._workload.current
        fresh = issued.expires_at - self._clock.now().timestamp() > RENEW_BEFORE
        return fresh and (cnf is None or cnf.x5t is None or (current is not None and current.x5t == cnf.x5t))

    def _is_good(self, issued: server_pb2.IssuedToken, cnf: Confirmation | None) -> bool:
        """Tell whether a kept token still works: by its session also under the certificate that came after its own."""
        if issued.expires_at <= self._clock.now().timestamp():
            return False
        current = self._workload.current
        is_held = cnf is None or cnf.x5t is None or (current is not None and current.x5t == cnf.x5t)
        return is_held or (cnf is not None and cnf.session is not None)

    async def _issue(self, request: tasks_pb2.IssueTokenRequest) -> server_pb2.IssuedToken:
        # The same key twice: if the first one was committed, this gives the same token and is charged once.
        issued: server_pb2.IssuedToken = await self._call("IssueToken", request)
        return issued

    async def _call(self, method: str, request: object) -> Any:
        """Ask, and once more where nobody answered: every request bears a key under which it is done once."""
        try:
            return await asked(self._api, method, request)
        except Unavailable:
            return await asked(self._api, method, request)
