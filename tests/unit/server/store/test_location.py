import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.errors import Misconfigured, Unavailable
from broker.server.store.location import FileIdentity, LockedFile, database_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


class TestUrl:
    def test_it_names_an_absolute_path(self) -> None:
        assert database_path("sqlite:///var/lib/broker/a%20b.db") == Path("/var/lib/broker/a b.db")

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "broker.db",
            "/var/lib/broker.db",
            "sqlite:",
            "sqlite:///",
            "sqlite:broker.db",
            "sqlite://host/broker.db",
            "sqlite:///broker.db?mode=memory",
            "sqlite:///broker.db#x",
            "postgresql:///broker",
        ],
    )
    def test_anything_else_is_refused(self, url: str) -> None:
        with pytest.raises(Misconfigured) as refused:
            database_path(url)
        assert refused.value.reason == "store_url"


class TestModes:
    @pytest.mark.bears("S03")
    def test_what_is_made_is_private_whatever_the_umask(self, tmp_path: Path, umask: int) -> None:
        held = LockedFile(tmp_path / "a" / "b" / "broker.db")
        held.release()
        assert [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")] == [0o700, 0o700]
        assert {mode(path) for path in (tmp_path / "a" / "b").iterdir()} == {0o600}

    @pytest.mark.bears("S03")
    def test_what_was_there_becomes_private(self, tmp_path: Path) -> None:
        names = ["broker.db", "broker.db-wal", "broker.db-shm", "broker.db-journal", "broker.db.lock"]
        for name in names:
            (tmp_path / name).touch()
            (tmp_path / name).chmod(0o666)
        LockedFile(tmp_path / "broker.db").release()
        assert {mode(tmp_path / name) for name in names} == {0o600}

    @pytest.mark.bears("S03")
    @pytest.mark.parametrize("suffix", ["", ".lock", "-wal", "-shm", "-journal"])
    def test_a_symbolic_link_is_refused_and_not_followed(self, tmp_path: Path, suffix: str) -> None:
        target = tmp_path / "target"
        target.touch(mode=0o644)
        (tmp_path / f"broker.db{suffix}").symlink_to(target)
        with pytest.raises(Misconfigured) as refused:
            LockedFile(tmp_path / "broker.db")
        assert refused.value.reason == "store_file"
        assert mode(target) == 0o644

    def test_a_directory_in_its_place_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "broker.db").mkdir()
        with pytest.raises(Misconfigured):
            LockedFile(tmp_path / "broker.db")

    def test_a_pipe_in_its_place_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "broker.db")
        with pytest.raises(Misconfigured, match="regular"):
            LockedFile(tmp_path / "broker.db")

    @pytest.mark.parametrize("bits", [0o770, 0o707, 0o1777])
    def test_a_directory_where_others_may_write_is_refused(self, tmp_path: Path, bits: int) -> None:
        shared = tmp_path / "shared"
        shared.mkdir()
        shared.chmod(bits)
        with pytest.raises(Misconfigured) as refused:
            LockedFile(shared / "broker.db")
        assert refused.value.reason == "store_directory_unsafe"
        assert list(shared.iterdir()) == []

    def test_a_directory_that_cannot_be_made_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(Misconfigured) as refused:
            LockedFile(tmp_path / "file" / "below" / "broker.db")
        assert refused.value.reason == "store_directory"

    def test_a_linked_directory_is_the_directory(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir(mode=0o700)
        (tmp_path / "link").symlink_to(tmp_path / "real")
        held = LockedFile(tmp_path / "link" / "broker.db")
        assert held.path == tmp_path / "real" / "broker.db"
        held.release()


@pytest.mark.bears("D06")
class TestLock:
    def test_a_second_server_is_refused_until_the_first_is_gone(self, tmp_path: Path) -> None:
        first = LockedFile(tmp_path / "broker.db")
        with pytest.raises(Misconfigured) as refused:
            LockedFile(tmp_path / "broker.db")
        assert refused.value.reason == "store_in_use"
        first.release()
        LockedFile(tmp_path / "broker.db").release()

    def test_another_process_is_refused_too(self, tmp_path: Path) -> None:
        held = LockedFile(tmp_path / "broker.db")
        code = (
            "import sys, pathlib\n"
            "from broker.errors import Misconfigured\n"
            "from broker.server.store.location import LockedFile\n"
            "try: LockedFile(pathlib.Path(sys.argv[1]))\n"
            "except Misconfigured as error: sys.exit(error.reason)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(held.path)], capture_output=True, text=True, timeout=30, check=False
        )
        held.release()
        assert (done.returncode, done.stderr.strip()) == (1, "store_in_use")

    def test_a_child_does_not_inherit_the_lock(self, tmp_path: Path) -> None:
        held = LockedFile(tmp_path / "broker.db")
        with subprocess.Popen(["sleep", "30"], close_fds=False) as child:
            held.release()
            LockedFile(tmp_path / "broker.db").release()
            child.kill()


@pytest.mark.bears("D05")
class TestCheck:
    @pytest.mark.parametrize("name", ["broker.db", "broker.db.lock", "broker.db-wal"])
    def test_a_file_that_is_gone_or_another_is_noticed(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "broker.db-wal").touch()
        held = LockedFile(tmp_path / "broker.db")
        held.remember_wal()
        held.check()

        kept = Path(tempfile.mkdtemp(dir=tmp_path)) / name
        (tmp_path / name).rename(kept)
        with pytest.raises(Unavailable) as gone:
            held.check()
        assert gone.value.reason == "store_replaced"
        (tmp_path / name).touch()
        with pytest.raises(Unavailable):
            held.check()
        kept.rename(tmp_path / name)
        held.check()
        held.release()

    def test_nothing_has_no_identity(self, tmp_path: Path) -> None:
        assert FileIdentity.of(tmp_path / "none") is None
