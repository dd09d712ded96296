"""An estate whose policy can be changed, as the server wires it."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from broker.server.tasks.policy.bundles import Bundles
from broker.server.tasks.policy.explain import Explain
from broker.server.tasks.policy.rejudge import Rejudge
from broker.server.tasks.policy.rules import Rules
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import Estate, running


@dataclass
class Governed:
    """An estate, its rules, and what changes and applies them."""

    estate: Estate
    rules: Rules
    bundles: Bundles
    rejudge: Rejudge
    explain: Explain
    ends: list[str]

    async def push(self, text: str) -> tuple[int, int]:
        """Put a policy in force and apply it to what runs; give how many tasks ended and tokens were revoked."""
        await self.bundles.push(text, by="operator:uid:0")
        return await self.rejudge.look()


@pytest.fixture(scope="module")
def oidc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path_factory.mktemp("oidc")) as issuer:
        yield issuer


@pytest.fixture
async def governed(tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Governed]:
    async with running(tmp_path, oidc) as estate:
        rules = estate.tokens.rules
        ends: list[str] = []
        rejudge = Rejudge(estate.store, rules, estate.clock, ends.append)
        bundles = Bundles(estate.store, rules, estate.clock, path=None, on_change=rejudge.soon)
        stop = await bundles.start()
        yield Governed(estate, rules, bundles, rejudge, Explain(estate.store, rules, estate.clock, estate.tokens), ends)
        stop()
