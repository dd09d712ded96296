"""What the filters of ``broker agent`` send, and what a purge may never take."""

from types import SimpleNamespace

import click
import pytest

from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.types import agent_pb2 as types_agent_pb2
from broker._proto.spire.api.types import selector_pb2, spiffeid_pb2
from broker.cli import agent, agent_filters
from broker.cli.main import main
from broker.cli.options import Settings

GIVEN = {
    "attestation_type": None, "banned": None, "can_reattest": None, "expires_before": None, "selectors": (),
    "match_selectors": "superset",
}  # fmt: skip


def test_without_filters_nothing_is_filtered() -> None:
    for kind in ("ListAgentsRequest", "CountAgentsRequest"):
        message = agent_filters.message(kind, GIVEN)
        assert message == getattr(agent_pb2, kind).Filter()
        assert not message.HasField("by_banned")


def test_false_is_a_filter_and_matches_have_the_wire_s_numbers() -> None:
    message = agent_filters.message("ListAgentsRequest", {**GIVEN, "banned": False, "can_reattest": True})
    assert message.HasField("by_banned")
    assert (message.by_banned.value, message.by_can_reattest.value) == (False, True)
    for name in ("exact", "subset", "superset", "any"):
        given = {**GIVEN, "selectors": ("x509pop:subject:cn:a",), "match_selectors": name}
        made = agent_filters.message("ListAgentsRequest", given).by_selector_match
        assert selector_pb2.SelectorMatch.MatchBehavior.Name(made.match) == f"MATCH_{name.upper()}"
        assert [(one.type, one.value) for one in made.selectors] == [("x509pop", "subject:cn:a")]


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("2026-01-31T12:00:00Z", "2026-01-31 12:00:00 +0000 +00"),
        ("2026-01-31 13:00:00+01:00", "2026-01-31 12:00:00 +0000 +00"),
        ("2026-01-31 12:00:00 -0700 -07", "2026-01-31 12:00:00 -0700 -07"),  # SPIRE's own way
    ],
)
def test_times_are_sent_as_spire_s_servers_read_them(written: str, sent: str) -> None:
    assert agent_filters.message("ListAgentsRequest", {**GIVEN, "expires_before": written}).by_expires_before == sent


def test_a_time_without_a_zone_is_none() -> None:
    with pytest.raises(click.UsageError, match="no time zone"):
        agent_filters.message("ListAgentsRequest", {**GIVEN, "expires_before": "2026-01-31T12:00:00"})


async def test_a_purge_takes_nobody_who_lives_is_banned_or_cannot_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the server is of a kind that passes over filters which it does not know."""
    long_ago, far_off = 1_000_000_000, 4_000_000_000

    def one(path: str, **more: object) -> types_agent_pb2.Agent:
        values = {"can_reattest": True, "x509svid_expires_at": long_ago, **more}
        return types_agent_pb2.Agent(id=spiffeid_pb2.SPIFFEID(trust_domain="a.test", path=path), **values)

    class Everybody:
        def __init__(self, channel: object, timeout: float) -> None:
            pass

        async def list(self, wanted: agent_pb2.ListAgentsRequest.Filter) -> list[types_agent_pb2.Agent]:
            assert wanted.by_expires_before
            return [
                one("/old"), one("/lives", x509svid_expires_at=far_off), one("/banned", banned=True),
                one("/token", can_reattest=False), one("/no-end", x509svid_expires_at=0),
            ]  # fmt: skip

    monkeypatch.setattr("broker.client.Nodes", Everybody, raising=False)
    monkeypatch.setattr(agent, "settings", Settings)
    rows = await agent._expired(SimpleNamespace(), agent.EXPIRED_FOR)
    assert [row["spiffe_id"] for row in rows] == ["spiffe://a.test/old"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["show"],
        ["show", "spiffe://a.test/x", "-spiffeID", "spiffe://a.test/y"],
        ["ban", "nonsense"],
        ["list", "--banned", "perhaps"],
        ["list", "--match-selectors", "some"],
        ["count", "--selector", "x"],
        ["purge", "--expired-for", "soon"],
        ["evict", "spiffe://a.test/x", "--no-input"],
    ],
)
def test_what_is_wrong_is_a_usage_error(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", *wrong, "--socket", "/nonexistent"]) == 2
    assert "hint: " in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["ban", "evict"])
def test_a_dry_run_sends_nothing(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", verb, "-spiffeID", "spiffe://a.test/x", "--dry-run", "--socket", "/nonexistent"]) == 0
    assert "nothing was sent" in capsys.readouterr().err
