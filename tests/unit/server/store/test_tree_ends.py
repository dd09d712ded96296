"""Whoever asks the rows of tasks whether they have ended asks the ends of their trees, too; and it costs no scan."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlite_utils import Database

from broker.clock import SystemClock
from broker.server.store import tables
from broker.server.store.schema import known_migrations, migrate
from broker.server.store.sqlite_connection import SqliteSchema, open_writer
from broker.server.store.tables import tasks as task_tables
from broker.server.store.tables.tree_ends import LIVING, TASKS_AS_READ

STATEMENT = re.compile(r"(SELECT|UPDATE|DELETE|WITH)\b.*\btasks\b", re.DOTALL)
ENDS = re.compile(r"\b(ended_at|state|version|cause)\b")
BY_THEMSELVES = {
    "tree_ends._END": "a beginning, without its WHERE",
    "tree_ends._END_SOME": "writes what is read already",
    "tree_ends._ROOT": "a root has its own end",
    "housekeeping._DEAD_TREES": "forgets what is written only",
}


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    (tmp_path / "x.db").touch()
    opened = open_writer(tmp_path / "x.db")
    migrate(SqliteSchema(opened), known_migrations(), SystemClock())
    yield opened
    opened.close()


def statements() -> Iterator[tuple[str, str]]:
    for found in pkgutil.iter_modules(tables.__path__):
        module = importlib.import_module(f"{tables.__name__}.{found.name}")
        for name, value in vars(module).items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and STATEMENT.match(text):
                    yield f"{found.name}.{name}", text


def test_no_statement_takes_the_rows_word_alone() -> None:
    asked = {name: text for name, text in statements() if ENDS.search(text)}
    alone = {name for name, text in asked.items() if "tree_ends" not in text}
    assert len(asked) > 15
    assert alone == BY_THEMSELVES.keys()


@pytest.mark.parametrize(
    ("question", "index"),
    [
        (f"SELECT 1 FROM tasks WHERE {LIVING} AND session = 'x'", "tasks_session"),
        (f"SELECT 1 FROM tasks WHERE agent = 'x' AND {LIVING}", "tasks_agent"),
        (f"SELECT 1 FROM tasks WHERE user_id = 'x' AND {LIVING} LIMIT 1 OFFSET 7", "tasks_user"),
        (task_tables._EARLIEST, "tasks_due"),
        (task_tables._OVERDUE, "tasks_due"),
        (f"SELECT state {TASKS_AS_READ} WHERE id = 'x'", "sqlite_autoindex_tasks_1"),
        (task_tables._LIST + f" AND {LIVING}" + task_tables._IN_ORDER, "tasks_age"),
    ],
)
def test_questions_have_their_index(db: Database, question: str, index: str) -> None:
    values = [""] * question.count("?")
    plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {question}", values).fetchall()]
    assert f"USING INDEX {index}" in plan[0], plan
    assert not any("SCAN tree_ends" in step for step in plan), plan
    assert "USE TEMP B-TREE FOR ORDER BY" not in plan, plan
