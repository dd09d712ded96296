"""The settings of the how-to on bindings are ones that a server takes."""

import re
from pathlib import Path

import pytest

from broker.server.settings import load

GUIDE = Path(__file__).resolve().parents[3] / "docs/how-to/bind-tokens.md"
TEXTS = re.findall(r"```toml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("text", TEXTS)
def test_the_guides_settings_are_taken(tmp_path: Path, text: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text)
    settings = load(file, {})
    assert settings.audiences or settings.tasks.foreign_starters or settings.tasks.trusted_proxies


def test_the_guide_names_every_binding() -> None:
    assert len(TEXTS) == 4
    named = set(re.findall(r"^\| `(\w+)` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {"x5t", "session", "dpop", "window", "bearer"}
