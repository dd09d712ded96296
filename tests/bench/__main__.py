"""``python -m tests.bench``: measure, and print one JSON object. Every item stands beside its limit on this machine."""

import argparse
import asyncio
import json
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

from broker.telemetry.log import configure
from tests.bench.answers import fetch_jwt_svid_warm, first_fetch_x509_svid
from tests.bench.containers import first_fetch_x509_svid_docker
from tests.bench.entries import entry_to_svid
from tests.bench.estate_size import server_with_many_entries
from tests.bench.exchange import exchange_https, exchange_socket
from tests.bench.house import House
from tests.bench.measure import Item, result
from tests.bench.signing import x509_svids
from tests.bench.starting import version
from tests.bench.trees import end_of_tree, five_hops
from tests.bench.verifying import verify_cold, verify_warm

SECONDS = 6.0
Measure = Callable[[House, float], Awaitable[list[Item]]]

ALONE: dict[str, Callable[[], list[Item]]] = {
    "verify_cold": verify_cold,
    "verify_warm": verify_warm,
    "version": version,
}
"""Measured in this process."""
IN_HOUSE: dict[str, Measure] = {
    "x509_svids_signed_per_core": x509_svids,
    "fetch_jwt_svid_warm": fetch_jwt_svid_warm,
    "first_fetch_x509_svid": first_fetch_x509_svid,
    "first_fetch_x509_svid_docker": first_fetch_x509_svid_docker,  # as root
    "exchange_socket": exchange_socket,
    "exchange_https": exchange_https,
    "five_hops": five_hops,
    "end_of_tree": end_of_tree,
    "server_with_many_entries": server_with_many_entries,
    "entry_to_svid": entry_to_svid,  # the last one: it fills the house
}
"""Measured on an estate of real processes."""


class Run:
    """Takes the items one after the other; one that fails is told and does not hide the others."""

    def __init__(self, only: list[str], seconds: float) -> None:
        self._only = only
        self._seconds = seconds
        self.items: list[Item] = []
        self.failed = 0

    async def take(self) -> None:
        for name in self._wanted(ALONE):
            await self._one(name, asyncio.to_thread(ALONE[name]))
        names = self._wanted(IN_HOUSE)
        if not names:
            return
        try:
            async with House(tell) as house:
                for name in names:
                    await self._one(name, IN_HOUSE[name](house, self._seconds))
        except Exception:  # noqa: BLE001 - an estate that does not start fails its items, not those before
            self._failure("the estate")

    def _wanted(self, of: dict[str, object]) -> list[str]:
        return [name for name in of if not self._only or name in self._only]

    async def _one(self, name: str, measuring: Awaitable[list[Item]]) -> None:
        began = time.monotonic()
        tell(f"{name} ...")
        try:
            items = await measuring
        except Exception:  # noqa: BLE001 - told, and counted
            self._failure(name)
            return
        self.items += items
        for item in items:
            limit = "" if item.limit is None else f", limit {item.limit:,.1f}, ratio {item.ratio or 0:.2f}"
            verdict = "met" if item.met else "MISSED"
            tell(f"  {item.name}: {item.value:,.1f} {item.unit}{limit}, budget {item.budget}: {verdict}")
        tell(f"  ({time.monotonic() - began:.0f} s)")

    def _failure(self, name: str) -> None:
        self.failed += 1
        tell(f"  {name}: FAILED\n{traceback.format_exc()}")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    names = [*ALONE, *IN_HOUSE]
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, default=[], metavar="NAME", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of load for one item")
    parser.add_argument("--json", type=Path, help="write the result to this file, too")
    given = parser.parse_args()
    configure("warning", "json")
    tell(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    run = Run(given.only, given.seconds)
    asyncio.run(run.take())
    text = json.dumps(result(run.items), indent=2)
    if given.json is not None:
        given.json.write_text(text + "\n")
    print(text)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
