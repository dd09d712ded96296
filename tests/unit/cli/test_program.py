"""The verbs that server and agent share: what is missing is named, a dry run starts nothing, a defect is not hidden."""

from importlib import import_module

import click
import pytest
from click.testing import CliRunner

from broker.cli import options, program
from broker.cli.options import Settings, noun
from broker.errors import Misconfigured


class Chosen:
    log_level, log_format = "info", "text"


def ran(parts, *arguments: str):
    made = noun("thing", "A thing.")
    program.add_run(made, "thing", parts)
    return CliRunner().invoke(made, ["run", *arguments], obj=Settings())


def test_what_is_not_installed_is_named_with_its_extra() -> None:
    def parts():
        raise ModuleNotFoundError("no", name="uvicorn")

    error = ran(parts).exception
    assert isinstance(error, Misconfigured)
    assert "uvicorn" in error.message and error.hint == "pip install 'identity-broker[thing]'"


def test_a_module_of_our_own_that_is_missing_is_a_defect() -> None:
    def parts():
        raise ModuleNotFoundError("no", name="broker.thing")

    assert isinstance(ran(parts).exception, ModuleNotFoundError)


def test_a_dry_run_reads_the_settings_and_starts_nothing(tmp_path) -> None:
    read, started = [], []

    def parts():
        return lambda path, environ: read.append(path) or Chosen(), started.append

    file = tmp_path / "thing.toml"
    assert ran(parts, "--config", str(file), "--dry-run").exit_code == 0
    assert (read, started) == ([file], [])


def test_it_starts_what_was_chosen(monkeypatch) -> None:
    chosen, started = Chosen(), []
    monkeypatch.setattr("broker.telemetry.log.configure", lambda level, form: started.append((level, form)))
    assert ran(lambda: (lambda path, environ: chosen, started.append)).exit_code == 0
    assert started == [("info", "text"), chosen]


@pytest.mark.parametrize("name", ["server", "agent"])
def test_help_names_the_file_that_is_read_by_default(name) -> None:
    command = import_module(f"broker.cli.{name}").COMMAND
    shown = CliRunner().invoke(command, ["run", "--help"], obj=Settings()).output
    assert f"/etc/broker/{name}.toml" in " ".join(shown.split())
    assert isinstance(command, options.Noun) and isinstance(command, click.Group)
