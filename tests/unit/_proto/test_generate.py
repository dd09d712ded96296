"""The generator: what it makes is what is checked in, it is deterministic, and it says what it cannot do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from broker._proto import generate
from broker._proto.spiffe import workload_pb2

PLAIN = 'syntax = "proto3"; package t; message M { string a = 1; }'


def source_of(tmp_path: Path, **files: str) -> Path:
    source = tmp_path / "proto"
    for name, text in files.items():
        path = source / "t" / f"{name}.proto"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return source


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return generate.generate()


def test_what_is_checked_in_is_current(made: dict[str, str]) -> None:
    assert generate.stale(made, generate.TARGET) == []


def test_generation_is_deterministic(made: dict[str, str]) -> None:
    assert generate.generate() == made


def test_every_file_says_that_it_is_generated(made: dict[str, str]) -> None:
    for name, text in made.items():
        assert "do not edit" in text.partition("\n")[0], name
        ast.parse(text)


def test_nothing_is_a_top_level_package_and_nothing_enters_the_default_pool(made: dict[str, str]) -> None:
    for name, text in made.items():
        assert "Default()" not in text, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and any(alias.name.endswith("_pb2") for alias in node.names):
                assert (node.module or "").startswith("broker._proto."), name


def test_the_workload_file_has_no_package_and_a_name_of_its_own() -> None:
    assert workload_pb2.DESCRIPTOR.package == ""
    assert workload_pb2.DESCRIPTOR.name == "spiffe/workload.proto"


def test_the_product_runs_where_the_compiler_is_not_installed() -> None:
    program = (
        "import sys; sys.modules['grpc_tools'] = None\n"
        "from broker._proto import service; from broker._proto.spiffe import workload_pb2\n"
        "sys.exit('broker._proto.generate' in sys.modules)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, timeout=50, check=False)
    assert ran.returncode == 0


def test_missing_changed_and_left_over_files_are_stale(tmp_path: Path) -> None:
    made = generate.generate(source_of(tmp_path, a=PLAIN))
    target = tmp_path / "out"
    target.mkdir()
    generate.write(made, target, made)
    assert generate.stale(made, target) == []

    (target / "t/a_pb2.py").unlink()
    (target / "t/a_pb2.pyi").write_text("changed")
    (target / "t/old_pb2.py").write_text(f"# {generate.MARK} from t/old.proto; do not edit.\n")
    names = generate.stale(made, target)
    assert names == ["t/a_pb2.py", "t/a_pb2.pyi", "t/old_pb2.py"]

    generate.write(made, target, names)
    assert generate.stale(made, target) == []


def test_a_file_that_was_not_generated_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t/mine.py").write_text("mine")
    with pytest.raises(generate.GenerationError, match="not generated"):
        generate.write({}, tmp_path, generate.stale({}, tmp_path))
    assert (tmp_path / "t/mine.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('syntax = "proto3"; message M { Nowhere a = 1; }', "Nowhere"),
        (
            'syntax = "proto3"; import "google/protobuf/api.proto"; message M { google.protobuf.Api a = 1; }',
            "api.proto",
        ),
        (
            'syntax = "proto2"; package t; message M { extensions 100 to 199; } extend M { optional int32 x = 100; }',
            "extensions",
        ),
    ],
)
def test_sources_that_cannot_be_made_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(generate.GenerationError, match=message):
        generate.generate(source_of(tmp_path, bad=text))


def test_check_names_stale_files_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], made: dict[str, str]
) -> None:
    monkeypatch.setattr(generate, "TARGET", tmp_path)
    assert generate.main(["--check"]) == 1
    assert "stale: spiffe/workload_pb2.py\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    assert sum(1 for _ in generate.present(tmp_path)) == len(made)
