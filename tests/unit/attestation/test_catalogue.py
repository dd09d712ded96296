"""Attestors are found by name, from trusted distributions, one for each name."""

from typing import ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

from broker.attestation.catalogue import Catalogue, Offer
from broker.attestation.contract import NODE_AGENT_GROUP, NODE_SERVER_GROUP, WORKLOAD_GROUP, AttestedNode, Evidence
from broker.errors import Misconfigured


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    depth: int = 1


class Attestor:
    name: ClassVar[str] = "mine"
    selectors = ()
    settings = Settings

    def __init__(self, settings: Settings) -> None:
        self.given = settings


def missing() -> None:
    raise ImportError("No module named 'nothing'")


def catalogue(*offers: Offer, trusted: str = "identity-broker") -> Catalogue:
    return Catalogue(frozenset({trusted}), lambda group: offers)


OURS = Offer("mine", "identity-broker", lambda: Attestor)


def test_the_built_in_ones_come_through_the_same_door() -> None:
    (unix,), broken = Catalogue().workload({"unix": {"discover_workload_path": True}})
    assert (unix.name, broken) == ("unix", ())
    assert Catalogue().node_agent("join_token", {}).name == "join_token"
    assert Catalogue().node_server("join_token", {}).name == "join_token"


def test_settings_are_read_by_the_attestors_own_model() -> None:
    (attestor,), _ = catalogue(OURS).workload({"mine": {"depth": "3"}})
    assert attestor.given.depth == 3
    with pytest.raises(Misconfigured, match="deep"):
        catalogue(OURS).workload({"mine": {"deep": 3}})


def test_a_bad_value_is_not_shown() -> None:
    with pytest.raises(Misconfigured) as refused:
        catalogue(OURS).workload({"mine": {"depth": "hunter2"}})
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("offers", "code"),
    [
        pytest.param([], "attestor_unknown", id="nobody offers it"),
        pytest.param([OURS, Offer("mine", "other", lambda: Attestor)], "attestor_ambiguous", id="two distributions"),
        pytest.param([OURS, OURS], "attestor_ambiguous", id="twice in one"),
        pytest.param([Offer("mine", "stranger", lambda: Attestor)], "attestor_untrusted", id="not trusted"),
    ],
)
def test_refused(offers, code) -> None:
    for make in (
        lambda c: c.workload({"mine": {}}),
        lambda c: c.node_agent("mine", {}),
        lambda c: c.node_server("mine", {}),
    ):
        with pytest.raises(Misconfigured) as refused:
            make(catalogue(*offers))
        assert refused.value.reason == code


def test_a_stranger_may_be_trusted_but_not_replace_join_tokens() -> None:
    foreign = Offer("mine", "Acme.Attestors", lambda: Attestor)
    assert catalogue(foreign, trusted="acme-attestors").workload({"mine": {}})[0][0].name == "mine"
    thief = Offer("join_token", "acme-attestors", lambda: Attestor)
    with pytest.raises(Misconfigured) as refused:
        catalogue(thief, trusted="acme-attestors").node_server("join_token", {})
    assert refused.value.reason == "attestor_unknown"


def test_a_broken_one_is_kept_with_its_reason() -> None:
    broken = Offer("broken", "identity-broker", missing)
    ready, unavailable = catalogue(OURS, broken).workload({"broken": {}, "mine": {}})
    assert [one.name for one in ready] == ["mine"]
    assert [(one.name, one.reason) for one in unavailable] == [("broken", "ImportError: No module named 'nothing'")]
    with pytest.raises(Misconfigured, match="no workload attestor"):
        catalogue(broken).workload({"broken": {}})
    with pytest.raises(Misconfigured, match="cannot be loaded"):
        catalogue(broken).node_agent("broken", {})


def test_an_attestor_under_another_name_is_refused() -> None:
    with pytest.raises(Misconfigured, match="calls itself"):
        catalogue(Offer("yours", "identity-broker", lambda: Attestor)).workload({"yours": {}})


def test_groups_are_apart() -> None:
    asked: list[str] = []
    spying = Catalogue(offers=lambda group: asked.append(group) or ())
    for make in (
        lambda: spying.workload({"x": {}}),
        lambda: spying.node_agent("x", {}),
        lambda: spying.node_server("x", {}),
    ):
        with pytest.raises(Misconfigured):
            make()
    assert asked == [WORKLOAD_GROUP, NODE_AGENT_GROUP, NODE_SERVER_GROUP]


def test_evidence_and_verdict_show_no_secret() -> None:
    assert "hunter2" not in repr(Evidence("join_token", b"hunter2"))
    assert "hunter2" not in repr(
        AttestedNode("/join_token/hunter2", frozenset(), reattestable=False, consumes="hunter2")
    )
