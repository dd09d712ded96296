"""Starts victims: processes of the victim's user and executable, under numbers that the harness chooses. Standard library only.

    victims.py UID SOCKET

Run by the victim's executable, as root. Lines in, a line back for each: ``spawn N…`` (a victim under each of these numbers, which must be
free), ``kill`` (all of them), ``serve`` (one honest call), ``churn SECONDS ALIVE`` (start and end victims under whatever number comes).
"""

import ctypes
import errno
import json
import os
import signal
import sys
import time
from collections import deque

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire

_CLONE3 = 435  # the same on every architecture
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
UID, SOCKET = int(sys.argv[1]), sys.argv[2]
PATIENCE = 30.0  # seconds until a number is free: a process just reaped may still be on its way out


def become():
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)


def victim():
    """The life of a victim: it is there."""
    try:
        become()
        while True:
            signal.pause()
    finally:
        os._exit(1)


def spawn(number):
    """A victim under this very number: clone3(2) with set_tid."""
    wanted = (ctypes.c_int32 * 1)(number)
    # flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup
    arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(wanted), 1, 0)
    deadline = time.monotonic() + PATIENCE
    while True:
        got = _libc.syscall(_CLONE3, ctypes.byref(arguments), ctypes.sizeof(arguments))
        if got == 0:
            victim()
        if got > 0:
            return
        if ctypes.get_errno() != errno.EEXIST or time.monotonic() > deadline:
            raise OSError(ctypes.get_errno(), f"no victim under {number}")
        time.sleep(0.001)


def end(pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def serve():
    """One honest call, by a victim."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            become()
            os.write(writer, json.dumps(wire.asked(SOCKET)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        answer = json.loads(said.read() or '["silent", null]')
    os.waitpid(child, 0)
    return answer


def churn(seconds, alive):
    """Start and end victims; give when each number was one: [[pid, from, to], …]."""
    until, living, seen = time.monotonic() + seconds, deque(), []
    while time.monotonic() < until:
        try:
            pid = os.fork()
        except BlockingIOError:  # no number is free
            time.sleep(0.001)
            continue
        if pid == 0:
            victim()
        living.append((pid, time.monotonic()))
        if len(living) > alive:
            oldest, began = living.popleft()
            seen.append((oldest, began, time.monotonic()))
            end([oldest])
        time.sleep(0.001)
    end([pid for pid, _ in living])
    return seen


def main():
    living = []
    for line in sys.stdin:
        verb, *arguments = line.split()
        answer = None
        if verb == "spawn":
            for number in map(int, arguments):
                spawn(number)
                living.append(number)
        elif verb == "kill":
            end(living)
            living.clear()
        elif verb == "serve":
            answer = serve()
        elif verb == "churn":
            answer = churn(float(arguments[0]), int(arguments[1]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
