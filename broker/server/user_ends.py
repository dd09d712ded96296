"""Wiring of what people say and what ends by them: stops, signals of identity providers, standing delegations, approvals."""

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from broker.clock import Clock
from broker.errors import Misconfigured
from broker.server.settings import ServerSettings
from broker.server.store.ports import Store
from broker.server.task_settings import TransmitterSettings
from broker.server.tasks.approvals import Approvals
from broker.server.tasks.config import Transmitter, check_transmitters
from broker.server.tasks.decision import Policy
from broker.server.tasks.delegations import Delegations
from broker.server.tasks.ids import Ids
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.signal_poll import Poller
from broker.server.tasks.signals import LogoutTokens, SecurityEvents, Signals
from broker.server.tasks.standing import Standing
from broker.server.tasks.stops import Stops
from broker.server.tasks.subjects import Subjects
from broker.server.tasks.user_leases import UserLeases
from broker.server.tasks.users import Users


@dataclass(frozen=True, slots=True)
class UserEnds:
    """The use cases. Close them with :meth:`aclose`."""

    stops: Stops
    users: Users
    delegations: Delegations
    approvals: Approvals
    logout_tokens: LogoutTokens
    events: SecurityEvents
    signals: Signals
    pollers: tuple[Poller, ...]
    leases: UserLeases

    def loops(self) -> Iterable[Coroutine[Any, Any, None]]:
        """Give what has to run for as long as the server does."""
        return [*(poller.run() for poller in self.pollers), *self.leases.loops()]

    async def aclose(self) -> None:
        """Close the connections to the transmitters."""
        for poller in self.pollers:
            await poller.aclose()
        await self.events.aclose()


def standing_of(settings: ServerSettings) -> Standing:
    """Give the judge of users' words, with the leases that are set."""
    leases = {one.issuer: one.session_lease for one in settings.subjects if one.session_lease is not None}
    return Standing(leases)


def user_ends(
    settings: ServerSettings,
    store: Store,
    clock: Clock,
    *,
    subjects: Subjects,
    standing: Standing,
    refusals: Refusals,
    ids: Ids,
    policy: Policy,
    count: Callable[[str], None],
) -> UserEnds:
    """Make the use cases; raises Misconfigured."""
    stops = Stops(store, clock, count=count)
    transmitters = check_transmitters(
        map(_transmitter, settings.ssf.streams),
        (found for one in settings.subjects if (found := subjects.issuer(one.issuer)) is not None),
    )
    events = SecurityEvents(transmitters, subjects, clock)
    signals = Signals(store, clock, stops, refusals)
    return UserEnds(
        stops=stops,
        users=Users(store, clock, stops),
        delegations=Delegations(
            store=store,
            clock=clock,
            subjects=subjects,
            standing=standing,
            stops=stops,
            refusals=refusals,
            ids=ids,
            policy=policy,
        ),
        approvals=Approvals(
            store=store, clock=clock, subjects=subjects, standing=standing, refusals=refusals, rules=policy.rules
        ),
        logout_tokens=LogoutTokens(subjects, clock),
        events=events,
        signals=signals,
        pollers=tuple(Poller(one, events, signals) for one in transmitters if one.poll_url),
        leases=UserLeases(store, clock, standing, policy.rules),
    )


def _transmitter(settings: TransmitterSettings) -> Transmitter:
    return Transmitter(
        settings.issuer,
        frozenset(settings.audiences),
        subject_issuer=settings.subject_issuer or settings.issuer,
        ca_path=settings.ca_path,
        jwks_url=settings.jwks_url,
        poll_url=settings.poll_url,
        poll_every=settings.poll_every / timedelta(seconds=1),
        token="" if settings.token_file is None else _token(settings.token_file),
    )


def _token(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    if not text:
        raise Misconfigured(f"the token file {path} of a transmitter cannot be read, or is empty", code="ssf_token")
    return text
