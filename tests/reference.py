"""Makes docs/reference from the program itself: `make docs` writes the pages, a test compares them."""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click

from broker.cli.config import _fields, _program
from broker.cli.root import NOUNS, ROOT
from broker.server.api.access import METHODS

DIRECTORY = Path(__file__).resolve().parents[1] / "docs" / "reference"


def settings_page() -> str:
    lines = [
        "# Settings",
        "",
        "Made by `make docs` from what `broker config schema` shows. A table per program in TOML; over it the environment:",
        "`server.store.url` is `BROKER_SERVER__STORE__URL`. The tables of attestors are in [docs/attestors](../attestors).",
    ]
    for program in ("server", "agent"):
        lines += ["", f"## {program.capitalize()}", "", "| setting | default | meaning |", "|---|---|---|"]
        lines += [
            f"| `{name}` | {f'`{default}`' if default else '-'} | {_cell(text)} |"
            for name, default, text in _fields(_program(program)[0], program)
        ]
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    lines = [
        "# Commands",
        "",
        "Made by `make docs` from the program's own help. Every verb also takes `-o/--output`, `-q`, `-v`, `--socket`, `--addr`,",
        "`--timeout`, `--dry-run`, `--yes` and `--no-input`.",
    ]
    for noun, (_, text) in NOUNS.items():
        command = ROOT.get_command(click.Context(ROOT), noun)
        assert command is not None
        lines += ["", f"## broker {noun}", "", text, "", "| command | does |", "|---|---|"]
        lines += [f"| `{path}` | {_cell(said)} |" for path, said in _verbs(f"broker {noun}", command)]
    return "\n".join(lines) + "\n"


def roles_page() -> str:
    lines = [
        "# Who may call what",
        "",
        "Made by `make docs` from the one table that decides. A method that is not here is denied to everybody. `any`: no",
        "authentication. `local`: root or the server's own user, on the admin socket. `admin`: an SVID of an entry with `admin`, or of",
        "`admin_ids`. `agent`: an attested, active node agent. `downstream`: an SVID of an entry with `downstream`. `peer`: any SVID of the",
        "own trust domain.",
        "",
        "| method | roles |",
        "|---|---|",
    ]
    lines += [f"| `{method[1:]}` | {', '.join(sorted(roles))} |" for method, roles in sorted(METHODS.items())]
    return "\n".join(lines) + "\n"


def _verbs(path: str, command: click.Command) -> Iterator[tuple[str, str]]:
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            verb = command.get_command(click.Context(command), name)
            assert verb is not None
            yield from _verbs(f"{path} {name}", verb)
        return
    arguments = [one.make_metavar(click.Context(command)) for one in command.params if isinstance(one, click.Argument)]
    yield " ".join([path, *arguments]), command.get_short_help_str(200)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES: Mapping[str, Callable[[], str]] = {
    "commands.md": commands_page,
    "roles.md": roles_page,
    "settings.md": settings_page,
}


def main() -> int:
    DIRECTORY.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (DIRECTORY / name).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
