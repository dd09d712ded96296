"""A task half to test with: a real store, a real directory of entries, a real OpenID issuer, a clock that a test moves."""

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from broker.audit.records import Record
from broker.keys import Signer
from broker.keys.local import generated
from broker.registry.entry import Entry
from broker.server.identity.changes import ENTRY_KIND, GONE, entry_text
from broker.server.identity.directory import Directory
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import Node
from broker.server.store.stores import open_store
from broker.server.tasks.actions import Actions
from broker.server.tasks.admission import Starters
from broker.server.tasks.approvals import Approvals
from broker.server.tasks.assertions import Assertions
from broker.server.tasks.changes import Changes
from broker.server.tasks.config import (
    Audience,
    Audiences,
    SubjectIssuer,
    TaskDefaults,
    Transmitter,
    check_transmitters,
)
from broker.server.tasks.decision import Policy
from broker.server.tasks.delegations import Delegations
from broker.server.tasks.exchange import Exchange
from broker.server.tasks.feed import Feed
from broker.server.tasks.foreign import ForeignStarters
from broker.server.tasks.ids import Ids
from broker.server.tasks.lifecycle import Lifecycle
from broker.server.tasks.outward import RemoteServer, RemoteServers, TransactionRules
from broker.server.tasks.policy.rules import Rules
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.requests import Actor, Door, IssuedToken, IssueRequest, StartRequest
from broker.server.tasks.sessions import ReportedSession, Sessions
from broker.server.tasks.signal_poll import Poller
from broker.server.tasks.signals import LogoutTokens, SecurityEvents, Signals
from broker.server.tasks.standing import Standing
from broker.server.tasks.stops import Stops
from broker.server.tasks.subjects import Subjects
from broker.server.tasks.supervisor import SupervisionRules, Supervisor
from broker.server.tasks.tokens import TaskTokens
from broker.server.tasks.user_leases import UserLeases
from broker.server.tasks.users import Users
from broker.server.user_ends import UserEnds
from broker.spiffe import Selector, SpiffeId
from broker.spiffe.jose import PublicKey
from broker.tasks import Authority, Resource, Task, VerifiedToken, verify_task_token
from broker.tasks.grants import GrantFormat
from tests.fakes.oidc import OidcIssuer

ISSUER = "https://broker.example.org:8443"
TICKETS = Resource("https://tickets.example.org")
WIKI = Resource("https://wiki.example.org")
NODE = SpiffeId("spiffe://example.org/spire/agent/join_token/one")
OTHER_NODE = SpiffeId("spiffe://example.org/spire/agent/join_token/two")
AGENT = SpiffeId("spiffe://example.org/triage")
NEIGHBOUR = SpiffeId("spiffe://example.org/neighbour")
INSPECTOR = SpiffeId("spiffe://example.org/tickets")
REPLACER = SpiffeId("spiffe://example.org/billing")
REMOTE = "https://as.partner.example"
FOREIGN_STARTERS = ("spiffe://partner.example/agents/*",)
X5T, X5T_2, X5T_3 = ("A" * 41 + letter + "w" for letter in "abc")


class ManualClock:
    """A clock that stands until it is moved. It starts at the real time: certificates of the issuer are real."""

    def __init__(self) -> None:
        self._now = datetime.now(UTC)
        self._monotonic = 1000.0

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)
        self._monotonic += seconds


class Keys:
    """The task-token keys as the key room gives them: the last one signs."""

    def __init__(self) -> None:
        self._signers = [generated("task-key-1")]

    def task_signer(self) -> Signer:
        return self._signers[-1]

    def task_keys(self) -> dict[str, PublicKey]:
        return {signer.id: signer.public_key for signer in self._signers}

    def rotate(self) -> None:
        self._signers.append(generated(f"task-key-{len(self._signers) + 1}"))


def detail(**members: Any) -> dict[str, Any]:
    return {"type": "api", "locations": [TICKETS.text], "actions": ["ticket.read", "ticket.write"]} | members


def authority(*details: dict[str, Any]) -> Authority:
    return Authority.parse(list(details or (detail(),)))


def entry(entry_id: str = "entry-1", spiffe_id: SpiffeId = AGENT, **fields: Any) -> Entry:
    return Entry(
        **{
            "id": entry_id,
            "spiffe_id": spiffe_id,
            "parent_id": NODE,
            "selectors": frozenset({Selector("unix:uid:1000")}),
            "created_at": datetime.now(UTC) - timedelta(days=1),
            "may_start_tasks": True,
        }
        | fields
    )


@dataclass
class Estate:
    """Everything that a test may touch."""

    store: Store
    clock: ManualClock
    oidc: OidcIssuer
    keys: Keys
    directory: Directory
    starters: Starters
    subjects: Subjects
    exchange: Exchange
    assertions: Assertions
    lifecycle: Lifecycle
    changes: Changes
    sessions: Sessions
    feed: Feed
    refusals: Refusals
    tokens: TaskTokens
    audiences: Audiences
    counted: list[tuple[str, str]]
    foreign: ForeignStarters
    ends: UserEnds
    supervisor: Supervisor
    actions: Actions

    def actor(self, **fields: Any) -> Actor:
        """The workload, as its node agent vouches for it."""
        return Actor(
            **{
                "spiffe_id": AGENT,
                "x5t": X5T,
                "not_after": self.clock.now() + timedelta(hours=1),
                "door": Door.AGENT,
                "session": "ws_1",
                "entry_id": "entry-1",
                "agent": NODE,
            }
            | fields
        )

    def caller(self, **fields: Any) -> Actor:
        """The workload, at the HTTPS door."""
        return self.actor(**{"door": Door.HTTPS, "session": None, "entry_id": None, "agent": None} | fields)

    def user_token(self, sub: str = "alice", **fields: Any) -> str:
        return self.oidc.token(sub, now=self.clock.now().timestamp(), **fields)

    def start_request(self, **fields: Any) -> StartRequest:
        return StartRequest(
            **{"user_token": self.user_token(), "purpose": "triage ticket 4711", "authority": authority()} | fields
        )

    async def start(self, actor: Actor | None = None, **fields: Any) -> Task:
        return await self.exchange.start(actor or self.actor(), self.start_request(**fields))

    async def issue(self, task: Task, actor: Actor | None = None, **fields: Any) -> IssuedToken:
        request = IssueRequest(**{"resource": TICKETS, "task_id": task.id} | fields)
        return await self.exchange.issue(actor or self.actor(), request)

    def verify(self, token: IssuedToken | str, audience: Resource = TICKETS) -> VerifiedToken:
        text = token if isinstance(token, str) else token.access_token
        return verify_task_token(text, self.keys.task_keys(), issuer=ISSUER, audience=audience, now=self.clock.now())

    async def put_entry(self, put: Entry) -> None:
        def act(writer: Writer) -> None:
            if writer.entry(put.id) is None:
                writer.add_entry(put)
            else:
                writer.replace_entry(put)
            writer.change(ENTRY_KIND, put.id, entry_text(put))

        await self.store.write(act)

    async def remove_entry(self, entry_id: str) -> None:
        def act(writer: Writer) -> None:
            writer.remove_entry(entry_id)
            writer.change(ENTRY_KIND, entry_id, GONE)

        await self.store.write(act)

    async def report(self, session: str, x5t: str, *, node: SpiffeId = NODE, **fields: Any) -> Any:
        told = ReportedSession(
            **{
                "id": session,
                "spiffe_id": AGENT,
                "entry_id": "entry-1",
                "x5t": x5t,
                "not_after": self.clock.now() + timedelta(hours=1),
            }
            | fields
        )
        return await self.sessions.report(node, [told], [])

    async def records(self, *events: str) -> list[Record]:
        rows = await self.store.read(lambda reader: reader.records(0, 100_000))
        found = [Record.from_body(row.body) for row in rows]
        return [record for record in found if not events or record.event in events]


def node(node_id: SpiffeId, **fields: Any) -> Node:
    return Node(
        **{
            "id": node_id,
            "attestation_type": "join_token",
            "serial": "1",
            "new_serial": "",
            "expires_at": datetime.now(UTC) + timedelta(days=1),
            "selectors": frozenset(),
        }
        | fields
    )


def _furnish(writer: Writer) -> None:
    for each in (NODE, OTHER_NODE):
        writer.put_node(node(each))
    writer.add_entry(entry())
    writer.add_entry(entry("entry-2", NEIGHBOUR, parent_id=OTHER_NODE))
    writer.add_entry(entry("entry-3", SpiffeId("spiffe://example.org/quiet"), may_start_tasks=False))


@asynccontextmanager
async def running(
    directory: Path,
    oidc: OidcIssuer,
    *,
    defaults: TaskDefaults | None = None,
    leases: Mapping[str, timedelta] | None = None,
    transmitters: Sequence[Transmitter] = (),
    supervision: SupervisionRules | None = None,
    url: str = "",
    **subject: Any,
) -> AsyncIterator[Estate]:
    """Open the store in a directory (made at first), or another one, and wire the task half as the server does."""
    foreign = ForeignStarters(FOREIGN_STARTERS, AGENT.trust_domain)
    clock, keys, starters = ManualClock(), Keys(), Starters(foreign)
    trusted = {"issuer": oidc.issuer, "audiences": frozenset({"broker"}), "ca_path": oidc.ca_path} | subject
    audiences = Audiences(
        [
            Audience(
                TICKETS,
                binding=frozenset({"x5t", "session", "dpop"}),
                introspectors=frozenset({INSPECTOR}),
                transactions=True,
                transaction_requesters=frozenset({INSPECTOR}),
            ),
            Audience(WIKI, binding=frozenset({"x5t"}), token_ttl=60),
        ]
    )
    async with open_store(url or f"sqlite://{directory}/broker.db", clock=clock) as store:
        if not await store.read(lambda reader: reader.nodes()):
            await store.write(_furnish)
        known = Directory(clock)
        await known.load(store)
        starters.load(known.entries())
        store.subscribe(starters.apply)
        subjects = Subjects([SubjectIssuer(**trusted)], clock)
        refusals = Refusals(store, clock)
        counted: list[tuple[str, str]] = []
        rules = Rules(audiences)
        parts: dict[str, Any] = {
            "store": store,
            "subjects": subjects,
            "keys": keys,
            "vouching": known,
            "starters": starters,
            "clock": clock,
            "ids": Ids(secrets.token_bytes),
            "refusals": refusals,
            "policy": Policy(audiences, defaults or TaskDefaults(), rules),
            "issuer": ISSUER,
            "count": lambda outcome, reason: counted.append((outcome, reason)),
        }
        standing = Standing(leases or {})
        tokens = TaskTokens(store, keys, clock, starters, audiences, issuer=ISSUER, rules=rules, standing=standing)
        exchange = Exchange(**parts, is_alive=tokens.is_alive, standing=standing)
        changes = Changes(
            store=store,
            clock=clock,
            vouching=known,
            starters=starters,
            policy=parts["policy"],
            standing=standing,
            ids=Ids(secrets.token_bytes),
            refusals=refusals,
        )
        feed = Feed(store, keys, clock, issuer=ISSUER, heartbeat=0.05)
        await feed.start()
        parts_of_users = {"store": store, "clock": clock, "subjects": subjects, "refusals": refusals}
        stops = Stops(store, clock)
        events = SecurityEvents(check_transmitters(transmitters, [SubjectIssuer(**trusted)]), subjects, clock)
        ends = UserEnds(
            stops=stops,
            users=Users(store, clock, stops),
            delegations=Delegations(
                **parts_of_users, standing=standing, stops=stops, ids=parts["ids"], policy=parts["policy"]
            ),
            approvals=Approvals(**parts_of_users, standing=standing, rules=rules),
            logout_tokens=LogoutTokens(subjects, clock),
            events=events,
            signals=(signals := Signals(store, clock, stops, refusals)),
            pollers=tuple(Poller(one, events, signals) for one in transmitters if one.poll_url),
            leases=UserLeases(store, clock, standing, rules),
        )
        supervisor = Supervisor(store, clock, supervision or SupervisionRules())
        await supervisor.start()
        formats = frozenset(GrantFormat)
        assertions = Assertions(
            **parts,
            tokens=tokens,
            transactions=TransactionRules(AGENT.trust_domain, replacers=frozenset({REPLACER, NEIGHBOUR})),
            remotes=RemoteServers(
                [RemoteServer(REMOTE, frozenset({WIKI}), formats, clients={AGENT: "triage"})], audiences
            ),
        )
        actions = Actions(
            store=store,
            clock=clock,
            tokens=tokens,
            audiences=audiences,
            vouching=known,
            starters=starters,
            ids=parts["ids"],
            refusals=refusals,
        )
        try:
            yield Estate(
                store, clock, oidc, keys, known, starters, subjects, exchange, assertions, Lifecycle(store, clock), changes,
                Sessions(store, clock, known, supervisor.agent_heard), feed, refusals, tokens, audiences, counted,
                foreign, ends, supervisor, actions,
            )  # fmt: skip
        finally:
            feed.stop()
            await ends.aclose()
            await subjects.aclose()
