"""The completion scripts, and what the shell hears when it asks."""

import os
import shutil
import subprocess
import sys

import pytest

from broker.cli.completion import ASKS
from broker.cli.main import main


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_that_has_it_is_read_by_it(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"{ASKS}={shell}_complete" in script
    if (program := shutil.which(shell)) is not None:
        subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=30)


def test_another_shell_is_no_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["broker", "en"], "plain,entry"),
        (["broker", "entry", "cr"], "plain,create"),
        (["broker", "entry", "create", "--spi"], "plain,--spiffe-id"),
    ],
)
def test_nouns_verbs_and_options_are_completed(words: list[str], answer: str) -> None:
    asked = {ASKS: "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    ran = subprocess.run(
        [sys.executable, "-m", "broker.cli.main"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert ran.stdout.split() == [answer]
