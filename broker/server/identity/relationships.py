"""Federation relationships as an operator makes them: create, change, delete, list. SPIRE's semantics and words.

Who ends a relationship ends what it brought: the bundle goes with it, in the same transaction, and is withdrawn from the
agents at once. A batch is one transaction, and every item of it has its own outcome.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.clock import Clock
from broker.errors import BrokerError, Conflict, Invalid, NotFound
from broker.server.identity.bundles import drop_bundle, put_bundle
from broker.server.identity.changes import GONE
from broker.server.identity.federated import RELATIONSHIP_KIND, Federated, relationship_text
from broker.server.identity.filters import Page, page
from broker.server.identity.withdrawals import NOTHING, Withdrawals
from broker.server.store.bundle_rows import PublishedBundle
from broker.server.store.ports import Store, Writer
from broker.spiffe import TrustDomain
from broker.spiffe.federation import Relationship

MAX_BATCH: Final = 100
"""Most items of one batch: each may bring a bundle, and it is one transaction that others wait for."""
MAX_RELATIONSHIPS: Final = 1000
"""Most relationships: each is polled for as long as the server runs."""


@dataclass(frozen=True, slots=True)
class Federation:
    """A relationship, with the bundle to begin with, or the one that is held now."""

    relationship: Relationship
    bundle: PublishedBundle | None = None


Draft = Federation | BrokerError
Outcome = Federation | BrokerError
Edit = Callable[[Federation], Federation]
"""What an update makes of a relationship; its bundle is None unless it is to be replaced. May raise Invalid."""


class Relationships:
    """The use cases of federation relationships."""

    def __init__(
        self,
        store: Store,
        federated: Federated,
        clock: Clock,
        trust_domain: TrustDomain,
        withdrawals: Withdrawals = NOTHING,
    ) -> None:
        self._store = store
        self._withdrawals = withdrawals
        self._federated = federated
        self._clock = clock
        self._trust_domain = trust_domain

    def get(self, trust_domain: TrustDomain) -> Federation:
        """Give one relationship with the bundle that is held; raises NotFound."""
        relationship = self._federated.stored.get(trust_domain)
        if relationship is None:
            raise NotFound("federation relationship does not exist", code="relationship_not_found")
        return self._shown(relationship)

    def find(self, size: int = 0, token: str = "") -> Page[Federation]:
        """Give a page of relationships by trust domain; those of the settings are not among them, as in SPIRE."""
        found = page(self._federated.stored.values(), lambda one: one.trust_domain.name, size, token)
        return Page([self._shown(one) for one in found.items], found.next)

    async def create(self, drafts: Sequence[Draft], actor: str) -> list[Outcome]:
        """Add relationships; Conflict for a trust domain that has one."""
        _check_batch(drafts)
        now = self._clock.now()

        def act(writer: Writer) -> list[Outcome]:
            return [_attempt(partial(self._create, writer, draft, actor, now)) for draft in drafts]

        return await self._store.write(act)

    async def update(self, edits: Sequence[tuple[TrustDomain, Edit] | BrokerError], actor: str) -> list[Outcome]:
        """Change relationships by a function of what they are now; NotFound where there is none."""
        _check_batch(edits)
        now = self._clock.now()

        def act(writer: Writer) -> list[Outcome]:
            return [_attempt(partial(_update, writer, edit, actor, now)) for edit in edits]

        return await self._store.write(act)

    async def delete(
        self, trust_domains: Sequence[TrustDomain | BrokerError], actor: str
    ) -> list[TrustDomain | BrokerError]:
        """Delete relationships, each with its bundle; it is withdrawn from the agents at once."""
        _check_batch(trust_domains)
        now = self._clock.now()

        def act(writer: Writer) -> list[TrustDomain | BrokerError]:
            return [self._delete(writer, one, actor, now) for one in trust_domains]

        return await self._store.write(act)

    def _shown(self, relationship: Relationship) -> Federation:
        return Federation(relationship, self._federated.bundles.get(relationship.trust_domain))

    def _create(self, writer: Writer, draft: Draft, actor: str, now: datetime) -> Federation:
        if isinstance(draft, BrokerError):
            raise draft
        relationship = draft.relationship
        if relationship.trust_domain == self._trust_domain:
            raise Invalid("unable to create federation relationship for server trust domain", code="relationship_own")
        if len(writer.relationships()) >= MAX_RELATIONSHIPS:
            raise Invalid(f"there are {MAX_RELATIONSHIPS} relationships already", code="too_many_relationships")
        if writer.relationship(relationship.trust_domain) is not None:
            raise Conflict("federation relationship already exists", code="relationship_exists")
        if draft.bundle is not None:
            put_bundle(writer, draft.bundle, actor, now)
        writer.add_relationship(relationship)
        _note(writer, relationship, Event.RELATIONSHIP_CREATED, actor, now)
        return Federation(relationship, writer.federated_bundle(relationship.trust_domain))

    def _delete(
        self, writer: Writer, trust_domain: TrustDomain | BrokerError, actor: str, now: datetime
    ) -> TrustDomain | BrokerError:
        if isinstance(trust_domain, BrokerError):
            return trust_domain
        if not writer.remove_relationship(trust_domain):
            return NotFound("federation relationship not found", code="relationship_not_found")
        writer.change(RELATIONSHIP_KIND, trust_domain.name, GONE)
        fields: dict[str, FieldValue] = {"trust_domain": trust_domain.name}
        writer.record(Record(Event.RELATIONSHIP_DELETED, now, actor, trust_domain.name, fields))
        if not self._federated.is_configured(trust_domain):
            drop_bundle(writer, trust_domain, actor, now, self._withdrawals)
        return trust_domain


def _update(writer: Writer, edit: tuple[TrustDomain, Edit] | BrokerError, actor: str, now: datetime) -> Federation:
    if isinstance(edit, BrokerError):
        raise edit
    trust_domain, change = edit
    current = writer.relationship(trust_domain)
    if current is None:
        raise NotFound("federation relationship not found", code="relationship_not_found")
    edited = change(Federation(current))
    if edited.bundle is not None:
        put_bundle(writer, edited.bundle, actor, now)
    writer.replace_relationship(edited.relationship)
    _note(writer, edited.relationship, Event.RELATIONSHIP_UPDATED, actor, now)
    return Federation(edited.relationship, writer.federated_bundle(trust_domain))


def _note(writer: Writer, relationship: Relationship, event: Event, actor: str, now: datetime) -> None:
    name = relationship.trust_domain.name
    writer.change(RELATIONSHIP_KIND, name, relationship_text(relationship))
    fields: dict[str, FieldValue] = {
        "trust_domain": name,
        "endpoint_url": relationship.url,
        "profile": relationship.profile.value,
        "endpoint_id": str(relationship.endpoint_id or ""),
    }
    writer.record(Record(event, now, actor, name, fields))


def _attempt(step: Callable[[], Federation]) -> Outcome:
    # Each step checks everything before it writes the first row, so an error leaves nothing behind.
    try:
        return step()
    except (Invalid, NotFound, Conflict) as error:
        return error


def _check_batch(items: Sequence[object]) -> None:
    if len(items) > MAX_BATCH:
        raise Invalid(f"a batch has at most {MAX_BATCH} items", code="batch_too_large")
