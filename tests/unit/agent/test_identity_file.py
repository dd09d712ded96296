"""The stored identity: whole or not at all, and for nobody else."""

import os

import pytest

from broker.agent.identity_file import FILE, IdentityFile, StoredIdentity
from broker.errors import InvalidJson, Misconfigured
from broker.spiffe import SpiffeId, TrustDomain
from tests.fakes.fake_server import TD, FakeCa


@pytest.fixture
def store(tmp_path):
    store = IdentityFile(tmp_path / "run" / "private")
    store.prepare()
    yield store
    store.release()


def identity() -> StoredIdentity:
    ca = FakeCa()
    return StoredIdentity(ca.identity(SpiffeId.of(TD, "/spire/agent/join_token/x")), ca.bundle)


def test_round_trip(store, tmp_path) -> None:
    assert store.load(TD) is None
    kept = identity()
    store.store(kept)
    found = store.load(TD)
    assert found.tls.chain_der == kept.tls.chain_der
    assert found.tls.key.private_numbers() == kept.tls.key.private_numbers()
    assert found.bundle == kept.bundle
    store.store(identity())
    assert set(os.listdir(tmp_path / "run" / "private")) == {FILE, ".lock"}
    store.remove()
    store.remove()
    assert store.load(TD) is None


def test_only_we_may_read_it(store, tmp_path) -> None:
    store.store(identity())
    path = tmp_path / "run" / "private" / FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.chmod(0o644)
    with pytest.raises(InvalidJson):
        store.load(TD)


def test_a_directory_that_others_may_enter_is_refused(tmp_path) -> None:
    directory = tmp_path / "private"
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    with pytest.raises(Misconfigured, match="this user alone"):
        IdentityFile(directory).prepare()
    link = tmp_path / "link"
    link.symlink_to(directory)
    with pytest.raises(Misconfigured):
        IdentityFile(link).prepare()


def test_a_link_in_its_place_is_not_followed(store, tmp_path) -> None:
    path = tmp_path / "run" / "private" / FILE
    (tmp_path / "elsewhere").write_bytes(identity().serialise())
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidJson):
        store.load(TD)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b[:-1],
        lambda b: b"",
        lambda b: b"{}",
        lambda b: b"[]",
        lambda b: b.replace(b'"format": 1', b'"format": 2'),
        lambda b: b.replace(b'"key": "', b'"key": "AA'),
    ],
)
def test_damage_is_told_without_the_content(store, tmp_path, spoil) -> None:
    kept = identity()
    (tmp_path / "run" / "private" / FILE).write_bytes(spoil(kept.serialise()))
    (tmp_path / "run" / "private" / FILE).chmod(0o600)
    with pytest.raises(InvalidJson) as refused:
        store.load(TD)
    assert str(refused.value) == "the stored identity cannot be read"


def test_another_trust_domains_identity_is_not_ours(store) -> None:
    store.store(identity())
    with pytest.raises(InvalidJson):
        store.load(TrustDomain("other.example"))


def test_nothing_secret_is_shown() -> None:
    assert "PrivateKey" not in repr(identity())


def test_one_agent_holds_a_directory(store, tmp_path) -> None:
    other = IdentityFile(tmp_path / "run" / "private")
    with pytest.raises(Misconfigured) as refused:
        other.prepare()
    assert refused.value.reason == "runtime_dir_in_use"
    store.release()
    store.release()
    other.prepare()
    other.release()


def test_workloads_can_pass_whatever_the_umask(tmp_path) -> None:
    before = os.umask(0o077)
    try:
        store = IdentityFile(tmp_path / "run" / "agent" / "private")
        store.prepare()
        store.release()
    finally:
        os.umask(before)
    assert [(tmp_path / "run" / name).stat().st_mode & 0o777 for name in ("", "agent", "agent/private")] == [
        0o755,
        0o755,
        0o700,
    ]
