"""What is kept for a restart: whole, ours, of this boot, or not at all."""

from datetime import UTC, datetime, timedelta

import pytest

from broker.agent import estate_file as module
from broker.agent import wire
from broker.agent.estate_file import FILE, EstateFile, KeptEstate, KeptSpare, worth_keeping
from broker.agent.sealed import KEY_SIZE, SealingKey
from broker.errors import InvalidJson
from broker.spiffe import SpiffeId
from tests.fakes.fake_server import TD, FakeCa, entry_message

NODE = SpiffeId.of(TD, "/spire/agent/x")
NOW = datetime(2026, 5, 1, tzinfo=UTC)
KEY = SealingKey(bytes(KEY_SIZE))


def estate(**changed) -> KeptEstate:
    full = entry_message(
        "e1", "/a", ["unix:uid:1", "k8s:ns:x"], hint="h", federates_with=["other.example"], revision=3, ttl=60,
        may_start_tasks=True, description="d", owner="o", allowed_audiences=["a"],
    )  # fmt: skip
    full.entry.expires_at = 4102444800
    full.entry.dns_names.append("a.example.org")
    ca = FakeCa()
    values = {
        "agent_id": NODE,
        "heard_at": NOW,
        "entries": (wire.entry(full, TD), wire.entry(entry_message("e2", "/b", ["unix:uid:2"]), TD)),
        "bundles": (wire.bundle(ca.message((FakeCa(),), tainted=True)),),
        "crls": (ca.crl(),),
        "spares": (KeptSpare("e1", (b"leaf", b"middle"), b"key", NOW - timedelta(hours=1)),),
    }
    return KeptEstate(**(values | changed))


@pytest.fixture
def file(tmp_path) -> EstateFile:
    return EstateFile(tmp_path, TD, KEY, boot_id="boot-1")


def test_what_is_read_is_what_was_written(file, tmp_path) -> None:
    assert file.load(NODE) is None
    kept = estate()
    file.store(kept)
    found = file.load(NODE)
    assert found.entries == kept.entries
    assert found == kept
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert "key" not in repr(kept.spares)
    # A list that none of the authorities signed.
    file.store(estate(crls=(FakeCa().crl(), b"x")))
    with pytest.raises(InvalidJson):
        file.load(NODE)
    file.remove()
    assert file.load(NODE) is None


@pytest.mark.bears("O02")
@pytest.mark.parametrize("where", [0, 40, -1])
def test_a_damaged_file_is_no_file(file, tmp_path, where) -> None:
    file.store(estate())
    content = bytearray((tmp_path / FILE).read_bytes())
    content[where] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(InvalidJson):
        file.load(NODE)


def test_of_another_agent_another_boot_or_another_user_it_is_not_read(file, tmp_path) -> None:
    file.store(estate())
    for other, node in (
        (EstateFile(tmp_path, TD, KEY, boot_id="boot-2"), NODE),
        (file, SpiffeId.of(TD, "/spire/agent/y")),
    ):
        with pytest.raises(InvalidJson):
            other.load(node)
    (tmp_path / FILE).chmod(0o640)
    with pytest.raises(InvalidJson):
        file.load(NODE)


def test_of_too_many_entries_only_those_in_use_are_kept(monkeypatch) -> None:
    entries = estate().entries
    assert worth_keeping(entries, ()) == (entries, False)
    monkeypatch.setattr(module, "MAX_ENTRIES", 1)
    assert worth_keeping(entries, ["e2"]) == (entries[1:], True)
