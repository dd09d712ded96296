"""A server for the agent's tests: the real TLS port and a real CA, and state that a test sets by hand.

It speaks Agent, Bundle, SVID, Watch, Sessions, Tasks and Feed. It decides nothing: what it signs, refuses or says is
what the test told it.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

import jwt as pyjwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker._proto.broker.server.v1 import actions_pb2, entries_pb2, feed_pb2, sessions_pb2, tasks_pb2, watch_pb2
from broker._proto.service import handler
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker._proto.spire.api.types import bundle_pb2, entry_pb2, selector_pb2, spiffeid_pb2, x509svid_pb2
from broker.agent.upstream import ACTIONS, AGENT, BUNDLE, FEED, SESSIONS, SVID, TASKS, WATCH
from broker.clock import Clock, SystemClock
from broker.errors import BrokerError, Refused
from broker.server.api.grpc.token_streams import TokenStreams
from broker.spiffe import Bundle, BundleSet, SpiffeId, TrustDomain
from broker.transport.callers import CallerIndex
from broker.transport.grpc_server import CallGuard, PrivateGrpcServer
from broker.transport.tls import SvidPeer, TlsIdentity, TlsPeer, server_context
from broker.transport.tls_listener import TlsListener

TD = TrustDomain("example.org")
SERVER_ID = SpiffeId.of(TD, "/spire/server")


class FakeCa:
    """One X.509 and one JWT authority."""

    def __init__(self, trust_domain=TD, clock: Clock | None = None) -> None:
        self.trust_domain = trust_domain
        self.clock = clock or SystemClock()
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.jwt_key = ec.generate_private_key(ec.SECP256R1())
        self.kid = secrets.token_hex(8)
        now = self.clock.now()
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fake"),
                x509.NameAttribute(NameOID.SERIAL_NUMBER, secrets.token_hex(8)),
            ]
        )
        builder = self._builder(name, name, self.key.public_key(), now, timedelta(hours=24), [str(trust_domain.id)])
        builder = builder.add_extension(x509.BasicConstraints(True, None), True)
        builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), True)
        self.name = name
        self.root = builder.sign(self.key, hashes.SHA256())

    def _builder(self, subject, issuer, public_key, now, ttl, uris, dns=()):
        names = [*(x509.UniformResourceIdentifier(uri) for uri in uris), *(x509.DNSName(one) for one in dns)]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(seconds=30))
            .not_valid_after(now + ttl)
            .add_extension(x509.SubjectAlternativeName(names), not list(subject))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False)
        )

    def crl(self, *serials: int, name: x509.Name | None = None) -> bytes:
        """A revocation list; ``name``: it says that it is another authority's."""
        now = self.clock.now()
        builder = x509.CertificateRevocationListBuilder(name or self.name, now, now + timedelta(hours=1))
        for serial in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.DER)

    def leaf(self, spiffe_id, public_key, ttl=timedelta(hours=1), dns=()) -> bytes:
        builder = self._builder(x509.Name([]), self.name, public_key, self.clock.now(), ttl, [str(spiffe_id)], dns)
        builder = builder.add_extension(x509.BasicConstraints(False, None), True)
        builder = builder.add_extension(_usage(digital_signature=True), True)
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(usages, False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.DER)

    def identity(self, spiffe_id, ttl=timedelta(hours=1)) -> TlsIdentity:
        key = ec.generate_private_key(ec.SECP256R1())
        return TlsIdentity((self.leaf(spiffe_id, key.public_key(), ttl),), key)

    def token(self, spiffe_id, audience, ttl=timedelta(minutes=5), **claims) -> str:
        now = self.clock.now()
        body = {
            "sub": str(spiffe_id),
            "aud": list(audience),
            "iat": int(now.timestamp()),
            "exp": int((now + ttl).timestamp()),
            "jti": secrets.token_hex(8),
        }
        return pyjwt.encode(body | claims, self.jwt_key, algorithm="ES256", headers={"kid": self.kid, "typ": "JWT"})

    @property
    def bundle(self) -> Bundle:
        return Bundle(self.trust_domain, (self.root,), {self.kid: self.jwt_key.public_key()}, sequence=1)

    def message(self, extra: "tuple[FakeCa, ...]" = (), tainted: bool = False) -> bundle_pb2.Bundle:
        message = bundle_pb2.Bundle(trust_domain=str(self.trust_domain), sequence_number=1)
        for ca in (self, *extra):
            message.x509_authorities.add(asn1=ca.root.public_bytes(Encoding.DER), tainted=tainted and ca is not self)
            spki = ca.jwt_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            message.jwt_authorities.add(public_key=spki, key_id=ca.kid)
        return message


def entry_message(
    entry_id, path, selectors, *, hint="", federates_with=(), created_at=None, revision=0, ttl=0, **ours
) -> entries_pb2.RegisteredEntry:
    return entries_pb2.RegisteredEntry(
        entry=entry_pb2.Entry(
            id=entry_id,
            spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain=str(TD), path=path),
            parent_id=spiffeid_pb2.SPIFFEID(trust_domain=str(TD), path="/spire/agent/join_token/x"),
            selectors=[
                selector_pb2.Selector(type=one.partition(":")[0], value=one.partition(":")[2]) for one in selectors
            ],
            hint=hint,
            federates_with=federates_with,
            revision_number=revision,
            x509_svid_ttl=ttl,
            created_at=created_at or int(datetime(2026, 1, 1, tzinfo=UTC).timestamp()),
        ),
        **ours,
    )


class FakeServer:
    """``async with FakeServer(directory) as server``: attributes are the state, ``port`` is where it listens."""

    def __init__(self, directory: Path, ca: FakeCa | None = None) -> None:
        self.ca = ca or FakeCa()
        self.directory = directory
        self.store = "store-1"
        self.seq = 1
        self.entries: dict[str, entries_pb2.RegisteredEntry] = {}
        self.foreign: dict[str, bundle_pb2.Bundle] = {}
        self.more_authorities: tuple[FakeCa, ...] = ()
        self.tokens = {"token-1": "node-1"}
        self.agent_ttl = timedelta(hours=1)
        self.svid_ttl = timedelta(hours=1)
        self.jwt_ttl = timedelta(minutes=5)
        self.refuse_agents: BrokerError | None = None
        self.refuse_signing: BrokerError | None = None
        self.sign_gate = asyncio.Event()
        self.sign_gate.set()
        self.hanging: set[str] = set()  # entries whose X.509-SVIDs are not answered for while they are in here
        self.forge = None  # a function of (entry, public key) that gives the chain to answer with
        self.forge_jwt = None
        self.batches: list[int] = []
        self.jwts_signed = 0
        self.sessions: dict[str, sessions_pb2.WorkloadSession] = {}
        self.ended: list[str] = []
        self.refused: list[tuple[str, int, int]] = []
        self.causes: list[str] = []  # of the ends, by their names on the wire
        self.watches: list[watch_pb2.WatchRequest] = []
        self.task_requests: list[object] = []
        self.calls_alone = self.token_streams = 0
        self.stream_error: BrokerError | None = None  # raised on a stream of token requests as it begins
        self.token_gates: dict[
            str, asyncio.Event
        ] = {}  # by task, "" for one that is to start: what its requests wait for
        self.token_errors: dict[str, Exception] = {}  # by task
        self.tokens_given_up: list[str] = []
        self._streams = TokenStreams(self._issue)
        self.runs: list[tuple[str, bool]] = []  # of each report: the agent's run, and whether it says that it is new
        self.detached: list[tuple[str, str]] = []
        self.over: set[str] = set()  # sessions that this server takes for ended
        self.agent_lease, self.lease = 0.0, 0.6  # seconds
        self.task_error: BrokerError | None = None
        self.feed_cursors: list[feed_pb2.SubscribeRequest] = []
        self.feed_acks: list[int] = []
        self.feed_seq = 1
        self.frames: list[feed_pb2.Frame] = []
        self.feed_beats = True
        self.heartbeat = 0.2
        self.attestations: list[str] = []
        self.renewals = 0
        self.port = 0
        self._changed = asyncio.Condition()
        self._watchers: list[asyncio.Queue[watch_pb2.WatchResponse]] = []
        # As the real one does: another authority, another SVID.
        self._identity = lru_cache(lambda ca: ca.identity(SERVER_ID))

    async def __aenter__(self):
        self.index: CallerIndex[TlsPeer] = CallerIndex()
        bindings = (AGENT, BUNDLE, SVID, WATCH, SESSIONS, TASKS, ACTIONS, FEED)
        anybody = {AGENT.methods["AttestAgent"].path, BUNDLE.methods["GetBundle"].path}
        access = {
            method.path: (lambda _: None) if method.path in anybody else self._agents_only
            for binding in bindings
            for method in binding.methods.values()
        }
        guard = CallGuard(self.index, access)
        self.grpc = PrivateGrpcServer(
            self.directory / f"g{secrets.token_hex(3)}" / "s", [handler(one, self, guard) for one in bindings]
        )
        await self.grpc.start()
        self.listener = TlsListener(
            host="127.0.0.1",
            port=self.port,
            context=lambda: server_context(
                self._identity(self.ca),
                [one.root.public_bytes(Encoding.DER) for one in (self.ca, *self.more_authorities)],
                client="optional",
            ),
            bundles=lambda: BundleSet.of(Bundle(TD, tuple(one.root for one in (self.ca, *self.more_authorities)))),
            clock=self.ca.clock,
            index=self.index,
            grpc_backend=self.grpc.path,
            http_app=None,
        )
        await self.listener.start()
        self.port = self.listener.port
        return self

    async def __aexit__(self, *_) -> None:
        await self.listener.stop()
        await self.grpc.stop(0)

    def trust_file(self) -> Path:
        path = self.directory / "bundle.pem"
        path.write_bytes(self.ca.root.public_bytes(Encoding.PEM))
        return path

    # ---- what a test does to it

    def put(self, entry: entries_pb2.RegisteredEntry) -> None:
        self.entries[entry.entry.id] = entry
        self._push(watch_pb2.WatchDelta(upserted=[entry]))

    def remove(self, entry_id: str) -> None:
        del self.entries[entry_id]
        self._push(watch_pb2.WatchDelta(deleted_ids=[entry_id]))

    def push_bundles(self, *bundles: bundle_pb2.Bundle) -> None:
        self._push(watch_pb2.WatchDelta(bundles=bundles))

    def push_crls(self, *crls: bytes) -> None:
        self._push(watch_pb2.WatchDelta(crls=watch_pb2.CrlSet(crls=crls)))

    def _push(self, delta: watch_pb2.WatchDelta) -> None:
        self.seq += 1
        for queue in self._watchers:
            queue.put_nowait(watch_pb2.WatchResponse(seq=self.seq, store=self.store, delta=delta))

    def say(self, response: watch_pb2.WatchResponse) -> None:
        for queue in self._watchers:
            queue.put_nowait(response)

    async def add_frame(self, **fields) -> int:
        async with self._changed:
            self.feed_seq += 1
            self.frames.append(feed_pb2.Frame(seq=self.feed_seq, **fields))
            self._changed.notify_all()
        return self.feed_seq

    def drop(self) -> None:
        self.listener.drop(lambda _: True)

    def _agents_only(self, peer: TlsPeer) -> None:
        if not isinstance(peer, SvidPeer):
            raise Refused("agents only", code="not_an_agent")
        if self.refuse_agents is not None:
            raise self.refuse_agents

    # ---- the services

    async def GetBundle(self, request, context, peer):
        return self.ca.message()

    async def AttestAgent(self, requests, context, peer) -> AsyncIterator[agent_pb2.AttestAgentResponse]:
        first = await anext(requests)
        token = first.params.data.payload.decode()
        self.attestations.append(token)
        if self.tokens.pop(token, None) is None:
            raise Refused(
                "failed to attest: join token does not exist or has already been used", code="join_token_unknown"
            )
        result = agent_pb2.AttestAgentResponse.Result(
            svid=self._agent_svid(f"/spire/agent/join_token/{token}", first.params.params.csr)
        )
        yield agent_pb2.AttestAgentResponse(result=result)

    async def RenewAgent(self, request, context, peer):
        self.renewals += 1
        return agent_pb2.RenewAgentResponse(svid=self._agent_svid(peer.svid.id.path, request.params.csr))

    def _agent_svid(self, path, csr) -> x509svid_pb2.X509SVID:
        key = x509.load_der_x509_csr(csr).public_key()
        return x509svid_pb2.X509SVID(cert_chain=[self.ca.leaf(SpiffeId.of(TD, path), key, self.agent_ttl)])

    async def BatchNewX509SVID(self, request, context, peer):
        self.batches.append(len(request.params))
        await self.sign_gate.wait()
        while self.hanging & {one.entry_id for one in request.params}:
            await asyncio.sleep(0.05)
        if self.refuse_signing is not None:
            raise self.refuse_signing
        response = svid_pb2.BatchNewX509SVIDResponse()
        for one in request.params:
            entry = self.entries.get(one.entry_id)
            if entry is None:
                response.results.add().status.code = 5
                continue
            csr = x509.load_der_x509_csr(one.csr)
            assert csr.is_signature_valid
            spiffe_id = SpiffeId.of(TD, entry.entry.spiffe_id.path)
            chain = (
                self.forge(entry, csr.public_key())
                if self.forge
                else [self.ca.leaf(spiffe_id, csr.public_key(), self.svid_ttl, entry.entry.dns_names)]
            )
            response.results.add().svid.cert_chain.extend(chain)
        return response

    async def NewJWTSVID(self, request, context, peer):
        await self.sign_gate.wait()
        if self.refuse_signing is not None:
            raise self.refuse_signing
        self.jwts_signed += 1
        entry = self.entries[request.entry_id]
        if entry.allowed_audiences and not set(request.audience) <= set(entry.allowed_audiences):
            raise Refused("the entry does not allow this audience", code="audience_not_allowed")
        spiffe_id = SpiffeId.of(TD, entry.entry.spiffe_id.path)
        token = (
            self.forge_jwt(entry, request.audience)
            if self.forge_jwt
            else self.ca.token(spiffe_id, request.audience, self.jwt_ttl)
        )
        response = svid_pb2.NewJWTSVIDResponse()
        response.svid.token = token
        return response

    async def Watch(self, request, context, peer) -> AsyncIterator[watch_pb2.WatchResponse]:
        self.watches.append(request)
        queue: asyncio.Queue[watch_pb2.WatchResponse] = asyncio.Queue()
        self._watchers.append(queue)
        try:
            if request.store != self.store or request.cursor == 0 or request.cursor > self.seq:
                for page in self._snapshot():
                    yield page
            while True:
                try:
                    async with asyncio.timeout(self.heartbeat):
                        response = await queue.get()
                except TimeoutError:
                    response = watch_pb2.WatchResponse(
                        seq=self.seq, store=self.store, heartbeat=watch_pb2.WatchHeartbeat()
                    )
                self._agents_only(peer)
                yield response
        finally:
            self._watchers.remove(queue)

    def _snapshot(self):
        entries = list(self.entries.values())
        half = len(entries) // 2
        first = watch_pb2.WatchSnapshot(entries=entries[:half], more=True)
        last = watch_pb2.WatchSnapshot(
            entries=entries[half:], bundles=[self.ca.message(self.more_authorities), *self.foreign.values()]
        )
        for page in (first, last):
            yield watch_pb2.WatchResponse(seq=self.seq, store=self.store, snapshot=page)

    async def ReportSessions(self, request, context, peer):
        for session in request.current:
            self.sessions[session.id] = session
        for session_id in request.ended:
            self.sessions.pop(session_id, None)
            self.ended.append(session_id)
            self.causes.append(sessions_pb2.SessionEnd.Name(request.causes[session_id]))
        self.refused += [(one.code, one.uid, one.count) for one in request.refused]
        self.runs.append((request.run, request.is_new_run))
        self.detached += [(one.task_id, one.session) for one in request.detached]
        over = [session.id for session in request.current if session.id in self.over]
        return sessions_pb2.ReportSessionsResponse(agent_lease=self.agent_lease, over=over)

    async def StartTask(self, request, context, peer):
        self.task_requests.append(request)
        if self.task_error is not None:
            raise self.task_error
        if (gate := self.token_gates.get("")) is not None:
            await gate.wait()
        return tasks_pb2.Task(id="task_1", agent=request.workload.spiffe_id, state="active")

    async def IssueToken(self, request, context, peer):
        self.calls_alone += 1
        return await self._issue(request, peer)

    async def IssueTokens(self, requests, context, peer):
        self.token_streams += 1
        if self.stream_error is not None:
            raise self.stream_error
        async with aclosing(self._streams.serve(requests, peer)) as answers:
            async for answer in answers:
                yield answer

    async def _issue(self, request, peer):
        self.task_requests.append(request)
        if (gate := self.token_gates.get(request.task_id)) is not None:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                self.tokens_given_up.append(request.task_id)
                raise
        if (error := self.token_errors.get(request.task_id)) is not None:
            raise error
        return tasks_pb2.IssuedToken(access_token="at", task_id=request.task_id)

    async def CompleteTask(self, request, context, peer):
        self.task_requests.append(request)
        return tasks_pb2.Task(id=request.task_id, state="completed")

    async def RenewLease(self, request, context, peer):
        self.task_requests.append(request)
        return tasks_pb2.Lease(task_id=request.task_id, ttl=self.lease, left=self.lease)

    async def AttachTask(self, request, context, peer):
        self.task_requests.append(request)
        if self.task_error is not None:
            raise self.task_error
        return tasks_pb2.Lease(task_id=request.task_id, ttl=self.lease, left=self.lease)

    async def ClaimAction(self, request, context, peer):
        self.task_requests.append(request)
        if self.task_error is not None:
            raise self.task_error
        return actions_pb2.ClaimedAction(result="claimed", action=actions_pb2.Action(id="act_1"))

    async def SettleAction(self, request, context, peer):
        self.task_requests.append(request)
        return actions_pb2.Action(id=request.id, state=request.state)

    async def Subscribe(self, requests, context, peer) -> AsyncIterator[feed_pb2.FeedMessage]:
        first = await anext(requests)
        self.feed_cursors.append(first)

        async def read() -> None:
            async for request in requests:
                self.feed_acks.append(request.acked)

        reader = asyncio.create_task(read())
        try:
            sent = first.acked if first.store == self.store else 0
            if not sent:
                snapshot = feed_pb2.FeedSnapshot(issuer="https://issuer", keys='{"keys":[]}', frames=self.frames)
                yield feed_pb2.FeedMessage(seq=self.feed_seq, store=self.store, snapshot=snapshot)
                sent = self.feed_seq
            while True:
                for frame in [one for one in self.frames if one.seq > sent]:
                    yield feed_pb2.FeedMessage(seq=frame.seq, store=self.store, frame=frame)
                    sent = frame.seq
                try:
                    async with asyncio.timeout(self.heartbeat), self._changed:
                        await self._changed.wait_for(lambda seen=sent: self.feed_seq > seen)
                except TimeoutError:
                    if self.feed_beats:
                        yield feed_pb2.FeedMessage(seq=sent, store=self.store, heartbeat=feed_pb2.FeedHeartbeat())
        finally:
            reader.cancel()


def _usage(**on):
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: on.get(name, False) for name in names})
