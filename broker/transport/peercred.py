"""The kernel's word on who holds the other end of a Unix socket: pid, uid, gid, and a handle that no pid reuse can fool.

Three answers of the kernel are never merged: a live peer, a peer that is gone (its pidfd is readable, or the kernel
says so), and a kernel that cannot tell. Only the first is a :class:`KernelPeer`. What the process *is* (its binary,
its container) is not known here.
"""

import contextlib
import errno
import os
import select
import socket
import struct
from dataclasses import dataclass

from broker.errors import NotAttested

# Linux 6.5; Python's socket module has no name for it yet.
SO_PEERPIDFD = 77
_UCRED = struct.Struct("=iII")
_NO_USER = 0xFFFFFFFF  # (uid_t)-1: what a uid without a mapping in our user namespace can never be told from
_GONE = frozenset({errno.EINVAL, errno.ESRCH, errno.ENODATA})

HINT_KERNEL = "Linux 6.5 or newer is needed to hold a peer without a race (SO_PEERPIDFD)"
HINT_PID_NAMESPACE = "the caller is outside the agent's pid namespace: run the agent in the host's (hostPID)"


@dataclass(frozen=True, slots=True)
class KernelPeer:
    """A connected process as the kernel knew it at connect(); owns ``pidfd``, which stays valid until :meth:`close`."""

    pid: int
    uid: int
    gid: int
    pidfd: int

    def is_alive(self) -> bool:
        """Whether the process has not exited: a zombie is gone, a process whose first thread ended is not."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return not poller.poll(0)

    def close(self) -> None:
        """Give the pidfd back; call once, by the owner."""
        os.close(self.pidfd)


def read_kernel_peer(sock: socket.socket) -> KernelPeer:
    """Read SO_PEERCRED and SO_PEERPIDFD of an accepted Unix socket.

    Raises:
        NotAttested: The peer is gone or outside our pid namespace; ``kernel_without_pidfd`` when the kernel is older
            than 6.5.
    """
    try:
        pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    except OSError as error:
        raise NotAttested("the peer's credentials cannot be read") from error
    if pid <= 0:
        raise NotAttested("the peer has no process id here", code="peer_outside_namespace", hint=HINT_PID_NAMESPACE)
    if _NO_USER in (uid, gid):
        raise NotAttested("the peer's user is not known here", code="peer_user_unknown")
    peer = KernelPeer(pid, uid, gid, _peer_pidfd(sock))
    if not peer.is_alive():
        peer.close()
        raise NotAttested("the peer is gone", code="peer_gone")
    return peer


def peer_pid(sock: socket.socket) -> int:
    """Read the pid alone; 0 when it cannot be had. Good for one question: is it this very process?"""
    try:
        pid: int = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
    except OSError:
        return 0
    return pid


def _peer_pidfd(sock: socket.socket) -> int:
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            raise NotAttested(
                "this kernel gives no handle on a peer", code="kernel_without_pidfd", hint=HINT_KERNEL
            ) from error
        if error.errno in _GONE:
            raise NotAttested("the peer is gone", code="peer_gone") from error
        raise NotAttested("no handle on the peer can be had") from error
    with contextlib.suppress(OSError):
        os.set_inheritable(pidfd, False)  # the kernel sets it already; a child must never inherit this handle
    return pidfd
