"""What an estate remembers of itself between two commands: ports, audiences, and the processes it started."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from broker.dev.certificates import write_private
from broker.dev.configuration import Ports
from broker.dev.processes import Started
from broker.errors import Misconfigured


@dataclass(frozen=True, slots=True)
class Record:
    """One estate as it was last seen."""

    ports: Ports
    audiences: tuple[str, ...]
    parts: Mapping[str, Started]


def write_record(path: Path, record: Record) -> None:
    """Write it, whole or not at all."""
    document = {
        "kind": "broker_dev_estate",
        "ports": {"server": record.ports.server, "issuer": record.ports.issuer},
        "audiences": list(record.audiences),
        "parts": {name: [one.pid, one.start_time] for name, one in record.parts.items()},
    }
    write_private(path, json.dumps(document, indent=2).encode())


def read_record(path: Path) -> Record | None:
    """Read it; None when there is none. Raises Misconfigured when it is something else."""
    try:
        document = json.loads(path.read_bytes())
        ports, parts = document["ports"], document["parts"]
        return Record(
            Ports(int(ports["server"]), int(ports["issuer"])),
            tuple(str(one) for one in document["audiences"]),
            {str(name): Started(int(pid), int(start)) for name, (pid, start) in parts.items()},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Misconfigured(
            f"{path} is not an estate's record", code="estate_record", hint="move the directory away and start afresh"
        ) from None
