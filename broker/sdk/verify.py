"""For services: accept a task token, or say why not.

The order is cheapest first: freshness of the feed, the cache by the token's SHA-256, structure, signature, claims, the
certificate on this connection, the binding, the state of the task. The state is asked on every call, also when everything
else is remembered: a token whose task has ended is dead at the next call after the frame. A leaf that is seen for the first
time after a rotation is looked up, once: that alone waits.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from broker.clock import Clock, SystemClock
from broker.errors import InvalidToken, Refused, Unavailable
from broker.sdk.action import ActionCalls
from broker.sdk.caller import Caller
from broker.sdk.evidence import Connection, Peers
from broker.sdk.feed import FeedState, Risk
from broker.sdk.leaves import Leaves
from broker.sdk.proofs import DpopRequest, ProofJudge
from broker.sdk.steady import SteadyClock
from broker.sdk.subscription import FeedSubscription
from broker.sdk.workload import Workload
from broker.spiffe import TrustDomain
from broker.spiffe.jose import PublicKey
from broker.tasks import (
    LEEWAY,
    Accepted,
    BindingMatch,
    PeerEvidence,
    Resource,
    ShownProof,
    VerifiedToken,
    check_binding,
    verify_task_token,
)
from broker.tasks.action import ActionState
from broker.tasks.keyset import read_keys
from broker.tasks.transactions import VerifiedTransaction, verify_transaction

__all__ = ["Caller", "TokenVerifier"]

TOKENS_REMEMBERED = 10_000
"""Tokens whose signature is not checked twice, each with its text: some thirty megabytes of usual ones."""

FIRST_SNAPSHOT_SECONDS = 15.0
"""How long discovery waits for the feed before it gives up."""


class _LeafUnknown(Refused):
    """The leaf is not the token's, and may be another one of the token's session: somebody else has to say."""

    def __init__(self, session: str, evidence: PeerEvidence) -> None:
        super().__init__("the token is bound to another holder", code="binding_mismatch")
        self.session = session
        self.evidence = evidence


@dataclass(slots=True)
class _Known:
    """A token whose signature holds, and the caller on the connection that showed it last."""

    verified: VerifiedToken
    evidence: PeerEvidence | None = None
    caller: Caller | None = None


class TokenVerifier:
    """Verifies task tokens for one audience against the live feed. Make it with :meth:`discover`."""

    def __init__(
        self, workload: Workload, issuer: str, audience: Resource, risk: Risk, clock: Clock, *, origin: str = ""
    ) -> None:
        """Prepare; :meth:`discover` or ``async with`` connects it."""
        self._workload = workload
        self._issuer = issuer
        self._audience = audience
        self._risk = risk
        # NOTE(security): a wall clock that is set back revives nothing (V09).
        self._clock = SteadyClock(clock)
        self._owns_workload = False
        self._tokens: OrderedDict[bytes, _Known] = OrderedDict()
        self._peers = Peers(lambda: workload.bundles, self._clock)
        self._leaves = Leaves(workload.channel, self._clock)
        self._calls = ActionCalls(workload)
        self.proofs = ProofJudge(origin or audience.text, self._clock)
        self._accepted = Accepted()
        self._keys: Mapping[str, PublicKey] = {}
        self.feed = FeedState()
        self._subscription = FeedSubscription(workload.channel, self.feed, self._clock, self._keys_changed)

    @classmethod
    async def discover(
        cls,
        issuer: str,
        *,
        audience: str,
        workload: Workload | None = None,
        risk: Risk = Risk.HIGH,
        clock: Clock | None = None,
        timeout: float = FIRST_SNAPSHOT_SECONDS,  # noqa: ASYNC109
        origin: str = "",
    ) -> Self:
        """Connect to the feed through the node agent and wait for the first snapshot.

        ``issuer`` must be the feed's issuer, exactly. Without ``workload`` one is opened on ``SPIFFE_ENDPOINT_SOCKET``.
        ``origin`` is the address that callers write, if it is not the audience's own: DPoP proofs must be for it.

        Raises:
            Unavailable: no snapshot in time.
            Refused: the feed is another issuer's.
        """
        owned = workload is None
        if workload is None:
            workload = await Workload.connect().__aenter__()
        verifier = cls(workload, issuer, Resource(audience), risk, clock or SystemClock(), origin=origin)
        verifier._owns_workload = owned
        try:
            await verifier._start(timeout)
        except BaseException:
            await verifier.aclose()
            raise
        return verifier

    async def __aenter__(self) -> Self:
        """Use as a block; leaving it closes the feed."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the feed."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close the feed, and the workload connection where this verifier opened it. Nothing verifies afterwards."""
        await self._subscription.stop()
        self.feed = FeedState()
        if self._owns_workload:
            await self._workload.__aexit__(None, None, None)

    async def verify(self, token: str, connection: Connection, *, dpop: DpopRequest | None = None) -> Caller:
        """Accept the token on this connection, or raise.

        ``connection`` is the TLS connection, its certificates as DER (leaf first), or the ASGI scope. ``dpop`` is what came
        with ``Authorization: DPoP``; None for ``Bearer``: the two are not the same token (RFC 9449 §7.2).

        Raises:
            InvalidToken: not a token of this issuer for this audience, or expired; or a proof that does not hold.
            NonceWanted: the proof lacks a nonce of this service.
            Refused: bound to somebody else, or its task, session or user has ended.
            Unavailable: the verifier does not know enough to accept.
        """
        try:
            return self.verify_now(token, connection, dpop=dpop)
        except _LeafUnknown as unknown:
            if not await self._leaves.ask(unknown.session, unknown.evidence):
                raise
        # Again from the beginning: meanwhile the task may have ended.
        return self.verify_now(token, connection, dpop=dpop)

    def verify_now(self, token: str, connection: Connection, *, dpop: DpopRequest | None = None) -> Caller:
        """Do the same without a coroutine: nothing here waits, so a leaf that nobody has asked about is a stranger's."""
        self.feed.require_fresh(self._clock.monotonic(), self._risk)
        known = self._known(token)
        verified = known.verified
        self.feed.require_good(verified.claims)
        proof = None if dpop is None else self.proofs.judge(dpop, token)
        cnf = verified.claims.cnf
        evidence = None if cnf is None or cnf.x5t is None else self._peers.evidence_of(connection)
        if proof is not None or known.caller is None or known.evidence is not evidence:
            # The binding is a matter of these two values alone: for the same two it is the same answer. A proof is of one call.
            caller = self._caller(token, verified, evidence, proof)
            if proof is not None:
                self.proofs.spend(proof)
                return caller
            known.caller, known.evidence = caller, evidence
        return known.caller

    async def settle_action(self, action_id: str, *, is_done: bool, outcome: object = None) -> None:
        """Say of an action of this service that is in doubt whether it was done, by what the service has on record itself.

        Raises:
            Conflict: it was settled otherwise.
            NotFound: there is no such action; it was claimed anew, or its task is long over.
            Refused: another service claimed it.
        """
        await self._calls.settle(action_id, ActionState.COMPLETED if is_done else ActionState.RELEASED, outcome)

    def verify_transaction(self, token: str, trust_domain: TrustDomain | str) -> VerifiedTransaction:
        """Accept a transaction token from the header ``Txn-Token``, or raise as :meth:`verify` does.

        It says what the call chain is about and is no proof of who calls: judge the caller by its connection, and hand the token on unchanged.
        """
        self.feed.require_fresh(self._clock.monotonic(), self._risk)
        ours = trust_domain if isinstance(trust_domain, TrustDomain) else TrustDomain(trust_domain)
        now = self._clock.now()
        verified = verify_transaction(token, self._keys, issuer=self._issuer, trust_domain=ours, now=now)
        claims = verified.claims
        self.feed.require_alive(root=claims.root, epoch=claims.epoch, task=claims.task, session=None, jti=claims.jti)
        # NOTE(security): of a user's many tasks one frame tells of all, and no other follows.
        self.feed.require_going(
            user=claims.sub, user_session=None, agent=str(claims.act[0]), audience=None, issued_at=claims.iat
        )
        return verified

    def _caller(
        self, token: str, verified: VerifiedToken, evidence: PeerEvidence | None, proof: ShownProof | None
    ) -> Caller:
        claims = verified.claims
        cnf = claims.cnf
        life = datetime.fromtimestamp(claims.iat, UTC), datetime.fromtimestamp(claims.exp, UTC)

        def match(shown: PeerEvidence | None) -> BindingMatch:
            return check_binding(cnf, verified.agent, shown, proof=proof, life=life, accepted=self._accepted)

        try:
            found = match(evidence)
        except Refused as error:
            session = None if cnf is None else cnf.session
            # NOTE(security): only the same ID under its own bundle is worth a question.
            if error.reason != "binding_mismatch" or session is None or not _is_of(evidence, verified):
                raise
            assert evidence is not None
            held = self._leaves.holds(session, evidence.x5t)
            if held is None:
                raise _LeafUnknown(session, evidence) from None
            if not held:
                raise
            found = match(evidence.of_session(session))
        authority = claims.authorization_details
        return Caller(claims.sub, verified.agent, verified.task_id, verified, found, authority, self._calls, token)

    def _known(self, token: str) -> _Known:
        # Text that is no token's is refused where it is read.
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        known = self._tokens.get(digest)
        now = self._clock.now()
        if known is not None:
            if now.timestamp() <= known.verified.claims.exp + LEEWAY:
                return known
            del self._tokens[digest]
            raise InvalidToken("the token has expired", code="token_expired", hint="ask for a new one")
        verified = verify_task_token(
            token,
            self._keys,
            issuer=self._issuer,
            audience=self._audience,
            now=now,
            bearer=self._accepted.bearer,
        )
        known = self._tokens[digest] = _Known(verified)
        if len(self._tokens) > TOKENS_REMEMBERED:
            self._tokens.popitem(last=False)
        return known

    def _keys_changed(self) -> None:
        self._keys = read_keys(self.feed.keys)
        binding = self.feed.bindings.get(self._audience.text, frozenset())
        self._accepted = Accepted(window="window" in binding, bearer="bearer" in binding)
        self._tokens.clear()  # a key that is gone must not live on in what it signed

    async def _start(self, timeout: float) -> None:  # noqa: ASYNC109
        try:
            async with asyncio.timeout(timeout):
                await self._workload.identity(timeout=timeout)
                await self._subscription.start()
        except TimeoutError:
            raise Unavailable(
                "the feed sent no snapshot in time",
                code="feed_unknown",
                hint="is the node agent connected to the server?",
            ) from None
        if self.feed.issuer != self._issuer:
            raise Refused(
                f"this node's feed belongs to the issuer {self.feed.issuer}, not {self._issuer}",
                code="issuer_mismatch",
                hint="configure the issuer exactly as the server names it",
            )


def _is_of(evidence: PeerEvidence | None, verified: VerifiedToken) -> bool:
    return evidence is not None and evidence.spiffe_id == verified.agent
