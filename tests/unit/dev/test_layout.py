"""Sockets have a short place, and it is ours alone."""

import tempfile
from pathlib import Path

import pytest

from broker.dev.layout import MAX_RUNTIME, default_directory, layout_of, private_directory
from broker.errors import Misconfigured


def test_default_directory() -> None:
    assert default_directory({"XDG_STATE_HOME": "/s"}) == Path("/s/broker-dev")
    assert default_directory({"XDG_STATE_HOME": "not/absolute"}) == Path.home() / ".local/state/broker-dev"
    assert default_directory({}) == Path.home() / ".local/state/broker-dev"


def test_a_short_directory_holds_its_own_sockets() -> None:
    assert layout_of(Path("/tmp/e"), {}).runtime == Path("/tmp/e/run")


def test_a_long_directory_has_its_sockets_elsewhere() -> None:
    long = Path("/tmp") / ("x" * 200)
    layout = layout_of(long, {})
    assert len(str(layout.runtime)) <= MAX_RUNTIME
    assert layout.runtime == layout_of(long, {}).runtime
    assert layout.runtime != layout_of(Path("/tmp") / ("y" * 200), {}).runtime
    for path in (layout.server_socket, layout.agent_socket, layout.token_socket):
        assert len(str(path)) < 108
    assert layout.state.parent == long


def test_the_session_s_own_directory_comes_first() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as session:
        layout = layout_of(Path("/tmp") / ("x" * 200), {"XDG_RUNTIME_DIR": session})
        assert layout.runtime.parent == Path(session)


def test_private_directory(tmp_path: Path) -> None:
    made = tmp_path / "a" / "b"
    private_directory(made)
    private_directory(made)
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o750)
    with pytest.raises(Misconfigured, match="ours alone"):
        private_directory(made)


def test_a_link_is_no_directory_of_ours(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(Misconfigured):
        private_directory(tmp_path / "link")
