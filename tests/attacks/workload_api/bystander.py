"""An honest caller in a process of its own, while others attack: how long each call took, and what failed.

    bystander.py SOCKET REQUEST-IN-HEX [UID]

Calls FetchJWTSVID on one connection every few milliseconds, and now and then on a new one. A line on standard input has it print
what it saw since the last one, as JSON.
"""

import json
import os
import select
import sys
import time

from tests.attacks.workload_api.frames import Connection

PATH = "/SpiffeWorkloadAPI/FetchJWTSVID"
PAUSE = 0.004
NEW_EVERY = 10  # calls


def call(connection: Connection, request: bytes) -> str:
    heard = connection.call(PATH, request, seconds=5)
    connection.streams.clear()
    return "" if heard.status == 0 else f"status {heard.status}, closed {connection.closed}"


def main() -> None:
    socket, request = sys.argv[1], bytes.fromhex(sys.argv[2])
    if len(sys.argv) > 3:
        os.setgroups([])
        os.setgid(int(sys.argv[3]))
        os.setuid(int(sys.argv[3]))
    warm = Connection(socket, wait=5)
    call(warm, request)
    took: dict[str, list[float]] = {"warm": [], "new": []}
    failures: list[str] = []
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        kind = "warm" if number % NEW_EVERY else "new"
        began = time.monotonic()
        try:
            if kind == "warm":
                failed = call(warm, request)
            else:
                with Connection(socket) as fresh:
                    failed = call(fresh, request)
        except OSError as error:
            failed = str(error)
        took[kind].append(time.monotonic() - began)
        if failed:
            failures.append(f"{kind}: {failed}")
            if kind == "warm":
                warm.close()
                try:
                    warm = Connection(socket)
                except OSError:
                    time.sleep(0.05)
        if select.select([sys.stdin], [], [], PAUSE)[0]:
            if not sys.stdin.readline():
                return
            print(json.dumps({"took": took, "failures": failures}), flush=True)
            took, failures = {"warm": [], "new": []}, []


if __name__ == "__main__":
    main()
