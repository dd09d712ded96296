"""A process that holds a connection to the agent and does with it what its arguments say. Standard library only.

    workload_process.py UID SOCKET RELAY ACT [COMMAND…]

It becomes UID (-1: stays), connects to SOCKET, forks a child that keeps the connection and offers it as the socket RELAY, prints a line, reads a
line, and then: ``stay`` waits for ever, ``exit`` ends, ``exec`` becomes COMMAND, ``setuid`` changes to the uid COMMAND,
``thread-exit`` ends its first thread only.
"""

import ctypes
import os
import select
import socket
import sys
import threading
import time


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def pump(connection: socket.socket, relay: str) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(relay)
    os.chmod(relay, 0o777)
    listening.listen(1)
    # A session of its own: the maker's number is free as soon as the maker is gone.
    os.setsid()
    say(f"ready {os.getpid()}")
    accepted, _ = listening.accept()
    pairs = {accepted: connection, connection: accepted}
    while True:
        readable, _, _ = select.select(list(pairs), [], [])
        for one in readable:
            try:
                data = one.recv(65536)
            except OSError:
                data = b""
            if not data:
                os._exit(0)
            pairs[one].sendall(data)


def main() -> None:
    uid, path, relay, act, *command = sys.argv[1:]
    if int(uid) >= 0:
        os.setgroups([])
        os.setgid(int(uid))
        os.setuid(int(uid))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    if os.fork() == 0:
        pump(connection, relay)
    sys.stdin.readline()
    if act == "exit":
        os._exit(0)
    if act == "exec":
        os.execv(command[0], command)
    if act == "setuid":
        os.setgid(int(command[0]))
        os.setuid(int(command[0]))
    if act == "thread-exit":
        threading.Thread(target=time.sleep, args=(3600,)).start()
        ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)  # exit(2): this thread alone
    say("done")
    time.sleep(3600)


if __name__ == "__main__":
    main()
