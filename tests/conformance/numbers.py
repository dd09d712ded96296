"""The numbered lines of the SPIFFE standards that this package answers for, one by one.

SPIFFE-ID (ID), X509-SVID (X5), JWT-SVID (JW), Workload Endpoint (WE), Workload API (WA), Trust Domain and Bundle (TB),
Federation (FE), and the incubating WIT-SVID (WI) and Broker API (BR). A number is borne by a test beside this file, or stands in ``not_applicable`` with its reason.
"""

from collections.abc import Mapping
from typing import Final

LAST: Final[Mapping[str, int]] = {
    "ID": 21,
    "X5": 23,
    "JW": 14,
    "WE": 13,
    "WA": 27,
    "TB": 10,
    "FE": 16,
    "WI": 14,
    "BR": 15,
}
"""How many lines each standard has: they are numbered from 1."""

ALL: Final = frozenset(f"{family}-{line:02}" for family, last in LAST.items() for line in range(1, last + 1))

OF_FILE: Final[Mapping[str, frozenset[str]]] = {
    "test_issuing.py": frozenset({"ID-17", "ID-18", "ID-19"}),
    "test_bundles.py": frozenset(f"TB-{line:02}" for line in range(1, 10)),
    "test_federation.py": frozenset(f"FE-{line:02}" for line in range(1, 17)),
}
"""Lines that come with a part of the product: they count from the moment on when that part's tests stand here."""

BY_ONE_CLIENT: Final[Mapping[str, str]] = {
    "WA-02": "it is about the description of the wire, which is compared with the standard's",
    "WA-03": "it is about what a client does: our SDK's part is tested here, an independent one's beside a restarting agent",
    "WA-13": "an independent client does not show hints; messages and our SDK do",
    "WA-19": "our SDK asks for no JWT bundles, since the node agent validates; messages and an independent client do",
    "WA-23": "neither client knows WIT-SVIDs: the methods are called by hand",
    "WA-26": "an independent client does not show hints",
    "WA-27": "clients put their own words around the agent's: what it says is read from its messages",
}
"""Lines of the Workload API that are not tested with every client, by hand, with our SDK and with an independent one: why."""
