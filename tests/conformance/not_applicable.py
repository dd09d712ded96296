"""Lines of the standards that no test here bears, each with the reason."""

from collections.abc import Mapping
from typing import Final

_WIT: Final = "WIT-SVIDs are incubating and off: both of their methods answer UNIMPLEMENTED, which WA-23 shows"
_BROKER: Final = "the SPIFFE Broker API is incubating and off: its methods answer UNIMPLEMENTED, which WE-11 shows"

NOT_APPLICABLE: Final[Mapping[str, str]] = {
    **{f"WI-{line:02}": _WIT for line in range(1, 15)},
    "WA-24": _WIT,
    **{f"BR-{line:02}": _BROKER for line in range(1, 16)},
    "TB-10": "advice on how many root keys to have: ours are several while one follows another, and one for each replica",
    "WA-07": "a MAY of servers that must spread updates: there is none to spread, each agent is told by its own stream",
}
