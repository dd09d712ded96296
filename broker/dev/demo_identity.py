"""The first act of the demo: a node proves itself, entries are made, a process is attested, a stranger is refused."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2
from broker.client import Entries, Nodes, dial_socket
from broker.client.calls import spiffe_id_message, spiffe_id_text
from broker.dev.configuration import TRUST_DOMAIN
from broker.dev.stage import NotHeld, Stage
from broker.errors import NoIdentity
from broker.sdk import Workload
from broker.spiffe import SpiffeId
from broker.spiffe.jose import parse_compact

POD, SERVICE = "triage-agent", "tickets-service"
POD_ID = f"spiffe://{TRUST_DOMAIN}/agent/triage"
SERVICE_ID = f"spiffe://{TRUST_DOMAIN}/service/tickets"
VAULT_AUDIENCE = "https://vault.dev.test"

Told = tuple[Sequence[str], Mapping[str, Any]]


async def estate(stage: Stage) -> Told:
    """Start the estate; the node agent proves itself by a one-time token, and the server by its bundle."""
    parts = await stage.estate.up(lambda _: None)
    failing = [part for part in parts if part.state != "running"]
    if failing:
        raise NotHeld(f"the {failing[0].name} is {failing[0].state}: {failing[0].detail}")
    channel = dial_socket(stage.estate.layout.server_socket)
    try:
        nodes = await Nodes(channel).list()
    finally:
        await channel.close()
    if len(nodes) != 1 or nodes[0].attestation_type != "join_token":
        raise NotHeld("the server does not know exactly one node that joined by a token")
    stage.kept["node"] = node = spiffe_id_text(nodes[0].id)
    pids = {part.name: part.pid for part in parts}
    lines = [
        f"trust domain      {TRUST_DOMAIN}, SQLite in {stage.estate.layout.data('server')}",
        *(f"{part.name:<16}  pid {part.pid}, {part.address}" for part in parts),
        f"node admitted     {node}",
        "                  by a join token that worked once; from now on by its own certificate",
    ]
    return lines, {"trust_domain": TRUST_DOMAIN, "node": node, "pids": pids}


async def entries(stage: Stage) -> Told:
    """Make one entry for the agent pod and one for the service: user and executable file must both be right."""
    made = []
    channel = dial_socket(stage.estate.layout.server_socket)
    try:
        for program, identity, more in (
            (POD, POD_ID, {"may_start_tasks": True, "allowed_audiences": [VAULT_AUDIENCE]}),
            (SERVICE, SERVICE_ID, {"dns_names": ["localhost"]}),
        ):
            entry = _entry(stage.install(program), identity, stage.kept["node"], **more)
            made.append(await Entries(channel).create(entry))
    finally:
        await channel.close()
    lines = []
    for one in made:
        lines.append(f"entry {one.entry.id}")
        lines.append(f"  gives     {spiffe_id_text(one.entry.spiffe_id)}")
        lines += [f"  only to   {s.type}:{s.value}" for s in one.entry.selectors]
        lines.append(f"  on node   {spiffe_id_text(one.entry.parent_id)}")
    lines.append("only the agent may start tasks; only the service has a DNS name: localhost")
    return lines, {"entries": [{"id": one.entry.id, "spiffe_id": spiffe_id_text(one.entry.spiffe_id)} for one in made]}


async def attestation(stage: Stage) -> Told:
    """Start the pod and the service, fetch SVIDs; this very process is not in any entry and must be refused."""
    pod, service, stranger = await asyncio.gather(_start_pod(stage), _start_service(stage), _refused(stage))
    x509, jwt = await pod.do("identity"), await pod.do("jwt", audience=VAULT_AUDIENCE)
    claims = parse_compact(jwt["token"]).payload
    if x509["spiffe_id"] != POD_ID or jwt["spiffe_id"] != POD_ID or claims.get("sub") != POD_ID:
        raise NotHeld(f"the pod received {x509['spiffe_id']}, not {POD_ID}")
    if service["spiffe_id"] != SERVICE_ID:
        raise NotHeld(f"the service received {service['spiffe_id']}, not {SERVICE_ID}")
    stage.kept.update(pod=pod, pod_x5t=x509["x5t"])
    lines = [
        f"pod, pid {pod.pid}, holds no secret; the kernel tells the agent who is on the socket",
        f"  X.509-SVID   {x509['spiffe_id']}",
        f"               x5t#S256 {x509['x5t']}",
        f"  JWT-SVID     sub {claims['sub']}, in {jwt['milliseconds']} ms",
        f"               aud {_one(claims.get('aud'))}, exp in {_life(claims)} s",
        f"service, pid {service['pid']}",
        f"  X.509-SVID   {service['spiffe_id']}, listening on {stage.service_url}",
        f"this process, pid {os.getpid()}, same user, another executable file",
        f"  refused      {stranger.message} ({stranger.reason})",
    ]
    facts = {
        "pod": {"pid": pod.pid, "spiffe_id": x509["spiffe_id"], "x5t": x509["x5t"]},
        "service": {"pid": service["pid"], "spiffe_id": service["spiffe_id"]},
        "jwt_svid": {"claims": claims, "milliseconds": jwt["milliseconds"]},
        "stranger": {"pid": os.getpid(), "code": stranger.reason},
    }
    return lines, facts


async def _start_pod(stage: Stage) -> Any:
    pod = await stage.play("agent pod", POD, "broker.dev.pod")
    await pod.do("identity")
    return pod


async def _start_service(stage: Stage) -> Mapping[str, Any]:
    issuer = stage.estate.require_record().ports.server_url
    service = await stage.play(
        "service", SERVICE, "broker.dev.service",
        "--issuer", issuer, "--audience", stage.service_url, "--port", str(stage.service_port),
    )  # fmt: skip
    ready = await service.hear()
    if "error" in ready:
        raise NotHeld(f"the service did not start: {ready['error']['message']} ({ready['error']['code']})")
    return {**ready, "pid": service.pid}


async def _refused(stage: Stage) -> NoIdentity:
    async with Workload.connect(f"unix:{stage.estate.layout.agent_socket}") as me:
        try:
            identity = await me.identity()
        except NoIdentity as refusal:
            return refusal
    raise NotHeld(f"a process that is in no entry received {identity.id}")


def _entry(program: Path, identity: str, node: str, **more: Any) -> entries_pb2.RegisteredEntry:
    selectors = (("unix", f"uid:{os.geteuid()}"), ("unix", f"path:{program}"))
    return entries_pb2.RegisteredEntry(
        entry=entry_pb2.Entry(
            spiffe_id=spiffe_id_message(SpiffeId(identity)),
            parent_id=spiffe_id_message(SpiffeId(node)),
            selectors=[selector_pb2.Selector(type=kind, value=value) for kind, value in selectors],
            dns_names=more.pop("dns_names", ()),
        ),
        **more,
    )


def _life(claims: Mapping[str, Any]) -> int:
    return int(claims["exp"]) - int(claims["iat"])


def _one(audience: object) -> str:
    return ", ".join(map(str, audience)) if isinstance(audience, list) else str(audience)
