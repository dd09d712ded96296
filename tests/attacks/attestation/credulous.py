"""Listeners that the harness must be able to fool, else it proves nothing. Standard library only.

    credulous.py SOCKET HOW UID EXECUTABLE IDENTITY DELAY

They give IDENTITY to whom they take for UID running EXECUTABLE. HOW is ``number``: each call is judged by SO_PEERCRED's user and by what
``/proc/<pid>`` says then; or ``start-time``: so, and the process must have the start time that it had just after accept (what SPIRE does).
DELAY in seconds is how long a call takes to judge.
"""

import os
import select
import socket
import struct
import sys
import time
from contextlib import suppress

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire

PATH, HOW, UID, EXECUTABLE, IDENTITY, DELAY = sys.argv[1:]


def started(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[19]
    except OSError:
        return None


def judge(pid, uid, began):
    time.sleep(float(DELAY))
    try:
        executable = os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return False
    if HOW == "start-time" and (began is None or started(pid) != began):
        return False
    return executable == EXECUTABLE and uid == int(UID)


def main():
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(PATH)
    os.chmod(PATH, 0o777)
    listening.listen(1024)
    callers = {}
    while True:
        for one in select.select([listening, *callers], [], [])[0]:
            if one is listening:
                connection, _ = listening.accept()
                pid, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                callers[connection] = pid, uid, started(pid)
                answer(connection, wire.frame(4, 0, 0))
                continue
            try:
                heard = one.recv(65536)
            except OSError:
                heard = b""
            if b"FetchX509SVID" in heard:
                answer(one, wire.response(IDENTITY) if judge(*callers[one]) else wire.denial())
                heard = b""
            if not heard:
                del callers[one]
                one.close()


def answer(connection, data):
    with suppress(OSError):  # it has gone
        connection.sendall(data)


if __name__ == "__main__":
    main()
