import subprocess
import sys
from pathlib import Path

import pytest

from broker.clock import SystemClock
from broker.errors import Misconfigured
from broker.server.store.postgres import PostgresStore
from broker.server.store.sqlite import SqliteStore
from broker.server.store.stores import open_store


async def test_the_url_decides(tmp_path: Path, postgresql: str) -> None:
    async with open_store(f"sqlite://{tmp_path}/x.db", clock=SystemClock()) as store:
        assert isinstance(store, SqliteStore)
        assert store.is_current
    assert not (tmp_path / "y.db").exists()
    for url in (postgresql, postgresql.replace("postgresql://", "postgres://")):
        async with open_store(url, clock=SystemClock()) as store:
            assert isinstance(store, PostgresStore)
            assert store.is_current


def test_another_is_refused() -> None:
    with pytest.raises(Misconfigured):
        open_store("mysql://x", clock=SystemClock())


def test_without_the_driver_sqlite_works_and_postgresql_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['psycopg'] = None\n"
        "from broker.clock import SystemClock\n"
        "from broker.errors import Misconfigured\n"
        "from broker.server.app import open_store\n"
        "try:\n"
        "    open_store('postgresql://u:hunter2@h/db', clock=SystemClock())\n"
        "except Misconfigured as error:\n"
        "    print(error.reason, error.hint, error.message)\n"
    )
    root = Path(__file__).resolve().parents[4]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True, cwd=root
    )
    assert "store_driver_missing" in done.stdout
    assert "identity-broker[postgres]" in done.stdout
    assert "hunter2" not in done.stdout
