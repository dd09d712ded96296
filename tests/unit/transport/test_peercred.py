"""The kernel's word on a peer, with real processes."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.errors import NotAttested
from broker.transport.peercred import SO_PEERPIDFD, KernelPeer, peer_pid, read_kernel_peer

CONNECT = "import socket,sys,time; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print('up', flush=True)"


@pytest.fixture
def listening(short: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(short / "s"))
        sock.listen(8)
        yield sock


def connector(listening: socket.socket, then: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"{CONNECT}; {then}", listening.getsockname()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.readline()
    return process


def finish(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe
        pipe.close()


def test_names_the_process_that_connected(listening: socket.socket) -> None:
    process = connector(listening, "sys.stdin.read()")
    accepted, _ = listening.accept()
    with accepted:
        peer = read_kernel_peer(accepted)
        facts = Path(f"/proc/self/fdinfo/{peer.pidfd}").read_text()
        assert (peer.pid, peer.uid, peer.gid) == (process.pid, os.geteuid(), os.getegid())
        assert f"Pid:\t{process.pid}\n" in facts
        assert not os.get_inheritable(peer.pidfd)
        assert peer.is_alive()
        finish(process)
        assert not peer.is_alive()
        peer.close()


def test_refuses_a_peer_that_died_and_was_reaped_before_accept(listening: socket.socket) -> None:
    pid = os.fork()
    if pid == 0:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(listening.getsockname())
            os._exit(0)
    os.waitpid(pid, 0)
    accepted, _ = listening.accept()
    with accepted, pytest.raises(NotAttested) as caught:
        read_kernel_peer(accepted)
    assert caught.value.reason == "peer_gone"


def test_refuses_a_zombie_whose_child_keeps_the_socket(listening: socket.socket) -> None:
    process = connector(listening, "import os; os.fork() or sys.stdin.read(); os._exit(0)")
    accepted, _ = listening.accept()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, not reaped
    with accepted, pytest.raises(NotAttested) as caught:
        read_kernel_peer(accepted)
    assert caught.value.reason == "peer_gone"
    assert peer_pid(accepted) == 0  # closed by now
    finish(process)


def test_a_killed_peer_shows_at_once(listening: socket.socket) -> None:
    process = connector(listening, "sys.stdin.read()")
    accepted, _ = listening.accept()
    with accepted:
        peer = read_kernel_peer(accepted)
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not peer.is_alive()
        peer.close()
    finish(process)


def test_its_own_process_is_told_by_pid(listening: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(listening.getsockname())
        accepted, _ = listening.accept()
        with accepted:
            assert peer_pid(accepted) == os.getpid()


class OtherKernel(socket.socket):
    """A socket as other kernels answer for it."""

    def __init__(self, *, credentials: tuple[int, int, int] = (1, 0, 0), pidfd_errno: int = 0) -> None:
        super().__init__(socket.AF_UNIX)
        self.credentials = credentials
        self.pidfd_errno = pidfd_errno

    def getsockopt(self, level: int, option: int, size: int = 0) -> object:
        if option == SO_PEERPIDFD:
            raise OSError(self.pidfd_errno, os.strerror(self.pidfd_errno))
        return b"".join((n & 0xFFFFFFFF).to_bytes(4, sys.byteorder) for n in self.credentials)


@pytest.mark.parametrize(
    ("kernel", "code"),
    [
        ({"pidfd_errno": errno.ENOPROTOOPT}, "kernel_without_pidfd"),
        ({"pidfd_errno": errno.EINVAL}, "peer_gone"),
        ({"pidfd_errno": errno.ESRCH}, "peer_gone"),
        ({"pidfd_errno": errno.EMFILE}, "not_attested"),
        ({"credentials": (0, 0, 0)}, "peer_outside_namespace"),
        ({"credentials": (7, -1, 0)}, "peer_user_unknown"),
    ],
)
def test_answers_of_other_kernels_are_never_merged(kernel: dict, code: str) -> None:
    with OtherKernel(**kernel) as sock, pytest.raises(NotAttested) as caught:
        read_kernel_peer(sock)
    assert caught.value.reason == code


def test_a_peer_is_not_hashable_by_accident_of_its_handle() -> None:
    assert KernelPeer(1, 2, 3, 4) == KernelPeer(1, 2, 3, 4)
