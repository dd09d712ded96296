"""What was acknowledged is there, whatever happens to the process or the disk: real files, real processes, real kills.

The same file is the child: ``python test_durability.py DATABASE LEDGER [FAILPOINT]`` writes without end and puts a line into
the ledger for each write that was acknowledged, after it was.
"""

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path

import pytest

from broker.audit.records import Record
from broker.audit.verify import verify_chain
from broker.errors import Unavailable
from broker.server import failpoints
from broker.server.store.ports import Writer
from broker.server.store.sqlite import SqliteStore
from broker.server.store.tables import SqlWriter
from tests.unit.server.store.samples import HOUR, NOW, record, task, token

ROUNDS = 10
WRITERS = 16
DEADLINE = 30.0
"""Seconds that a child may take to get somewhere before the test gives up."""
ARMED_AFTER = 40
"""Writes that a child acknowledges before its failpoint is armed."""

POINTS = ("store.before_begin", "store.after_act", "store.before_commit", "store.after_commit")


def exchange(name: str) -> Callable[[Writer], None]:
    def act(w: Writer) -> None:
        assert w.recall("me", name, "digest") is None
        held = w.task("tsk_1")
        assert held is not None
        w.add_token(token(f"jti_{name}"))
        w.remember("me", name, "digest", f"jti_{name}", NOW + HOUR)
        w.change("token", name, "{}")
        w.record(record(name))

    return act


async def child(database: Path, ledger: Path, point: str) -> None:
    sheet = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    numbers = count()
    async with SqliteStore.open(database) as store:

        def begin(w: Writer) -> str:
            if w.task("tsk_1") is None:
                w.add_task(task())
            assert isinstance(w, SqlWriter)
            return f"{w._sql.row('PRAGMA journal_mode')} {w._sql.row('PRAGMA synchronous')}"

        ledger.with_suffix(".settings").write_text(await store.write(begin))

        async def write() -> None:
            while True:
                number = next(numbers)
                if number == ARMED_AFTER and point:
                    failpoints.arm(point, allowed=True)
                name = f"{os.getpid()}-{number}"
                # Some fail: what they wrote must never be seen, also not after a kill.
                if number % 7 == 0:
                    try:
                        await store.write(refused(name))
                    except ValueError:
                        continue
                await store.write(exchange(name))
                os.write(sheet, f"{name}\n".encode())

        async with asyncio.TaskGroup() as writers:
            for _ in range(WRITERS):
                writers.create_task(write())


def refused(name: str) -> Callable[[Writer], None]:
    def act(w: Writer) -> None:
        exchange(f"refused-{name}")(w)
        raise ValueError

    return act


class Ledger:
    """The child's ledger, read by the parent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def names(self) -> list[str]:
        # A line without its end was cut by the kill.
        return [line[:-1].decode() for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def wait_for(self, lines: int, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + DEADLINE
        while len(self.names()) < lines:
            assert process.poll() is None, "the child ended by itself"
            assert time.monotonic() < deadline, "the child is too slow"
            time.sleep(0.002)


@contextmanager
def running(database: Path, ledger: Ledger, point: str = "") -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, __file__, str(database), str(ledger.path), point]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}) as process:
        try:
            yield process
        finally:
            process.kill()


@asynccontextmanager
async def verified(database: Path, ledger: Ledger) -> AsyncIterator[SqliteStore]:
    """Open what a kill left behind, and hold it against the ledger."""
    async with SqliteStore.open(database) as store:
        rows = await store.read(lambda r: r.records(0, 10_000_000))
        head = await store.read(lambda r: r.chain_head())
        changes = await store.read(lambda r: r.changes_since(0, 10_000_000))
        assert verify_chain(rows, expect=head) == head
        assert changes is not None
        assert [change.seq for change in changes] == list(range(1, len(changes) + 1))

        recorded = [Record.from_body(row.body).subject for row in rows]
        acknowledged = ledger.names()
        missing = set(acknowledged) - set(recorded)
        assert missing == set(), f"{len(missing)} of {len(acknowledged)} acknowledged writes are lost"
        assert len(set(recorded)) == len(recorded)
        assert [change.key for change in changes] == recorded
        assert not any(name.startswith("refused") for name in recorded)
        # Every row of an exchange came with the others, and SQLite itself finds nothing wrong.
        db = sqlite3.connect(database)
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        tokens = {jti.removeprefix("jti_") for (jti,) in db.execute("SELECT jti FROM tokens")}
        answers = {key for (key,) in db.execute("SELECT key FROM idempotency")}
        db.close()
        assert tokens == answers == set(recorded)
        yield store


@pytest.mark.bears("D01", "D06")
@pytest.mark.timeout(180)
async def test_nothing_acknowledged_is_lost_by_kills(tmp_path: Path) -> None:
    database, ledger = tmp_path / "data" / "broker.db", Ledger(tmp_path / "ledger")
    chance = random.Random(4711)
    for _ in range(ROUNDS):
        before = len(ledger.names())
        with running(database, ledger) as process:
            ledger.wait_for(before + chance.randint(1, 400), process)
            assert ledger.path.with_suffix(".settings").read_text() == "('wal',) (2,)", "synchronous is not FULL"
            process.send_signal(signal.SIGKILL)
            process.wait(DEADLINE)
        # The lock went with the process; at most what was in flight is there without a line.
        async with verified(database, ledger) as store:
            written = await store.read(lambda r: r.chain_head())
        assert len(ledger.names()) > before
        assert written.seq - len(ledger.names()) <= WRITERS * ROUNDS


@pytest.mark.bears("D01")
@pytest.mark.parametrize("point", POINTS)
async def test_nothing_acknowledged_is_lost_by_an_end_at_any_step(tmp_path: Path, point: str) -> None:
    database, ledger = tmp_path / "broker.db", Ledger(tmp_path / "ledger")
    with running(database, ledger, f"{point}=exit") as process:
        assert process.wait(DEADLINE) == failpoints.EXIT_STATUS
    async with verified(database, ledger) as store:
        assert len(ledger.names()) > 0
        await store.write(exchange("after"))


@pytest.mark.bears("D11")
async def test_a_migration_that_is_cut_off_is_done_again(tmp_path: Path) -> None:
    database = tmp_path / "broker.db"
    code = (
        "import asyncio, pathlib, sys\n"
        "from broker.server import failpoints\n"
        "from broker.server.store.sqlite import SqliteStore\n"
        "failpoints.arm('store.in_migration=exit', allowed=True)\n"
        "async def main():\n"
        "    async with SqliteStore.open(pathlib.Path(sys.argv[1])): pass\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(database)], timeout=DEADLINE, check=False)
    assert done.returncode == failpoints.EXIT_STATUS
    async with SqliteStore.open(database) as store:
        assert await store.write(lambda w: w.change("k", "x", "")) == 1


@pytest.fixture
def small_disk() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs CAP_SYS_ADMIN: mounts a small file system")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)
    directory.rmdir()


@pytest.mark.root
@pytest.mark.bears("D04")
async def test_a_full_disk_refuses_writes_answers_reads_and_recovers_by_itself(small_disk: Path) -> None:
    async with SqliteStore.open(small_disk / "broker.db") as store:
        await store.write(lambda w: w.add_task(task()))
        ballast = small_disk / "ballast"
        told: list[int] = []
        store.subscribe(lambda changes: told.extend(change.seq for change in changes))

        acknowledged = 0
        with ballast.open("wb") as file:
            while True:
                try:
                    file.write(b"\0" * 65_536)
                    file.flush()
                except OSError:
                    break
        reason = ""
        while not reason:
            try:
                await store.write(exchange(f"a{acknowledged}"))
                acknowledged += 1
            except Unavailable as full:
                reason = full.reason
        assert reason in {"store_full", "store_io"}
        for number in range(3):
            with pytest.raises(Unavailable):
                await store.write(exchange(f"b{number}"))
        assert await store.read(lambda r: (r.chain_head().seq, r.change_head())) == (acknowledged, acknowledged)
        assert told == list(range(1, acknowledged + 1))

        ballast.unlink()
        await store.write(exchange("again"))
        assert await store.read(lambda r: r.tokens_issued("tsk_1")) == acknowledged + 1
        rows = await store.read(lambda r: r.records(0, 100_000))
        assert verify_chain(rows).seq == acknowledged + 1


if __name__ == "__main__":
    asyncio.run(child(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
