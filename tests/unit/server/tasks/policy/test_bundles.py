"""Which policy is in force: files, pushes, replicas, and one that cannot be read here."""

import json
from pathlib import Path

import pytest

from broker.errors import Conflict, Misconfigured, NotFound
from broker.server.store.policy_ports import PolicySource
from broker.server.tasks.policy import bundle as bundles
from broker.server.tasks.policy.bundle import PolicyRefused
from broker.server.tasks.policy.bundles import POLICY_CHANGE, Bundles
from broker.server.tasks.policy.decision import Effect
from broker.server.tasks.policy.rules import Rules
from tests.unit.server.tasks.policy.conftest import Governed

CLOSED = '@id("none") forbid(principal, action, resource);'
OPEN = '@id("all") permit(principal, action, resource);'


class Replica:
    """Another server over the same store."""

    def __init__(self, governed: Governed, path: Path | None = None) -> None:
        self.rules = Rules(governed.estate.tokens._audiences)
        self.changes = 0
        estate = governed.estate
        self.bundles = Bundles(estate.store, self.rules, estate.clock, path=path, on_change=self._changed)

    def _changed(self) -> None:
        self.changes += 1


async def test_a_server_without_settings_begins_with_the_built_in_one(governed: Governed) -> None:
    row = await governed.bundles.show()
    assert (row.source, row.version, row.text) == (PolicySource.BUILT_IN, 1, bundles.built_in_text())
    assert governed.rules.hash == row.hash == bundles.built_in().hash


async def test_a_push_is_in_force_everywhere_before_it_returns(governed: Governed) -> None:
    other = Replica(governed)
    await other.bundles.start()
    row = await governed.bundles.push(CLOSED, by="operator:uid:0")
    assert governed.rules.hash == other.rules.hash == row.hash == bundles.hash_of(CLOSED)
    assert (row.version, row.source, row.put_by, other.changes) == (2, PolicySource.PUSHED, "operator:uid:0", 2)
    (first, changed) = await governed.estate.records("policy_changed")
    assert changed.actor == "operator:uid:0"
    assert dict(changed.fields) == {
        "policy": row.hash,
        "version": "2",
        "previous": first.fields["policy"],
        "source": "pushed",
        "rule_count": 1,
    }


async def test_the_same_again_changes_nothing(governed: Governed) -> None:
    first = await governed.bundles.push(CLOSED, by="a")
    assert await governed.bundles.push(CLOSED, by="b") == first
    assert len(await governed.estate.records("policy_changed")) == 2


async def test_what_is_refused_changes_nothing(governed: Governed) -> None:
    before = governed.rules.hash
    with pytest.raises(PolicyRefused):
        await governed.bundles.push('@id("a") permit(principal, action, resource) when { context.act == 1 };', by="a")
    assert governed.rules.hash == before == (await governed.bundles.show()).hash


async def test_nobody_elses_change_is_lost(governed: Governed) -> None:
    before = governed.rules.hash
    await governed.bundles.push(CLOSED, by="a", expected=before)
    with pytest.raises(Conflict) as caught:
        await governed.bundles.push(OPEN, by="b", expected=before)
    assert caught.value.reason == "stale_version"
    assert governed.rules.hash == bundles.hash_of(CLOSED)


async def test_an_older_one_is_shown_by_its_hash(governed: Governed) -> None:
    await governed.bundles.push(CLOSED, by="a")
    await governed.bundles.push(OPEN, by="a")
    assert (await governed.bundles.show(bundles.hash_of(CLOSED))).text == CLOSED
    with pytest.raises(NotFound):
        await governed.bundles.show("sha-256:no")


async def test_a_file_is_put_in_force_at_the_start(governed: Governed, tmp_path: Path) -> None:
    await governed.bundles.push(CLOSED, by="a")
    file = tmp_path / "policy.cedar"
    file.write_text(OPEN)
    replica = Replica(governed, file)
    await replica.bundles.start()
    assert governed.rules.hash == replica.rules.hash == bundles.hash_of(OPEN)
    assert (await governed.bundles.show()).source is PolicySource.FILE
    with pytest.raises(Conflict) as caught:
        await replica.bundles.push(CLOSED, by="a")
    assert caught.value.reason == "policy_is_file"
    # Another start with the same file is no change.
    await Replica(governed, file).bundles.start()
    assert len(await governed.estate.records("policy_changed")) == 3
    # Without the file, what is in the store stays: nothing opens by a line that is gone from the settings.
    plain = Replica(governed)
    await plain.bundles.start()
    assert plain.rules.hash == bundles.hash_of(OPEN)


@pytest.mark.parametrize(
    "content", [None, b"permit(", b"\xff", b'@id("a") permit(principal, action, resource) when { context.x };']
)
async def test_a_file_that_is_wrong_stops_the_start(governed: Governed, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "policy.cedar"
    if content is not None:
        file.write_bytes(content)
    before = await governed.bundles.show()
    with pytest.raises(Misconfigured) as caught:
        await Replica(governed, file).bundles.start()
    assert str(file) in caught.value.message
    assert await governed.bundles.show() == before


async def test_a_newer_programs_built_in_policy_replaces_the_old(governed: Governed, monkeypatch) -> None:
    monkeypatch.setattr(bundles, "built_in_text", lambda: CLOSED)
    replica = Replica(governed)
    await replica.bundles.start()
    assert governed.rules.hash == replica.rules.hash == bundles.hash_of(CLOSED)
    assert (await governed.bundles.show()).source is PolicySource.BUILT_IN


async def test_one_that_cannot_be_read_here_denies_everything(governed: Governed) -> None:
    """A newer server pushed what this one does not know: closed until it does, and nothing is ended meanwhile."""
    task = await governed.estate.start()
    text = '@id("a") permit(principal, action, resource) when { context.from_the_future };'

    def act(writer):
        now = writer.policy()
        body = {"hash": "h", "text": text, "source": "pushed", "put_by": "x", "put_at": now.put_at.isoformat()}
        writer.change(POLICY_CHANGE, str(now.version + 1), json.dumps(body))

    await governed.estate.store.write(act)
    assert (governed.rules.hash, governed.rules.bundle) == ("h", None)
    told = governed.rules.may_begin(task)
    assert told.effect is Effect.DENY
    assert "cannot be read by this version" in told.errors[0]
    assert await governed.rejudge.look() == (0, 0)
