"""The second act of the demo: a user, a task, a token, and a service that accepts it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from broker.dev.demo_identity import POD_ID, SERVICE_ID
from broker.dev.stage import OTHER_AUDIENCE, NotHeld, Stage
from broker.spiffe.jose import parse_compact

USER = "alice"
TICKET = "4711"
READ, DELETE = "ticket.read", "ticket.delete"
TASK_SECONDS = 600
PURPOSE = f"triage ticket {TICKET}"

Told = tuple[Sequence[str], Mapping[str, Any]]


async def user(stage: Stage) -> Told:
    """Get the user's ID token from the OpenID issuer, as an application would after sign-in."""
    token = stage.estate.user_token(USER)
    claims = parse_compact(token).payload
    if claims.get("sub") != USER or claims.get("aud") != "broker":
        raise NotHeld("the issuer's token is not the user's word to the broker")
    stage.kept["user_token"] = token
    shown = {name: claims[name] for name in ("iss", "sub", "aud", "sid", "acr")}
    lines = [f"{name:<4} {value}" for name, value in shown.items()]
    lines.append("the agent may show this to the broker, and to nobody else: its audience is the broker")
    return lines, {"claims": claims}


async def task(stage: Stage) -> Told:
    """Start a task: the pod brings its own identity by the socket, and the user's word."""
    wanted = [
        {"type": "api", "locations": [stage.service_url], "actions": [READ], "identifier": TICKET},
        {"type": "api", "locations": [OTHER_AUDIENCE], "actions": ["invoice.read"]},
    ]
    started = await stage.kept["pod"].do(
        "start",
        user_token=stage.kept["user_token"],
        purpose=PURPOSE,
        authorization_details=wanted,
        ttl=TASK_SECONDS,
    )
    if started["state"] != "active":
        raise NotHeld(f"the task is {started['state']}")
    stage.kept["task"] = started["task"]
    lines = [
        f"task      {started['task']}, {started['state']}, in {started['milliseconds']} ms",
        f"for       {started['user']}",
        f"by        {POD_ID}",
        f"purpose   {PURPOSE}",
        *(f"may       {_detail(detail)}" for detail in started["authorization_details"]),
        "ends      when it is completed, when the pod's process ends, or at the latest in ten minutes",
    ]
    facts = {name: value for name, value in started.items() if name != "milliseconds"}
    return lines, {**facts, "milliseconds": started["milliseconds"]}


async def token(stage: Stage) -> Told:
    """Get the task token: one audience, some minutes, bound to this process's certificate."""
    got = await stage.kept["pod"].do("token", resource=stage.service_url)
    jws = parse_compact(got["token"])
    claims = jws.payload
    cnf: Any = claims.get("cnf")
    actor: Any = claims.get("act")
    if claims.get("aud") != stage.service_url:
        raise NotHeld(f"the token is for {claims.get('aud')}")
    if not isinstance(cnf, dict) or cnf.get("x5t#S256") != stage.kept["pod_x5t"]:
        raise NotHeld("the token is not bound to the pod's certificate")
    if not isinstance(actor, dict) or actor.get("sub") != POD_ID or claims.get("client_id") != POD_ID:
        raise NotHeld("the token does not name the agent as the actor")
    stage.kept["token"] = got["token"]
    life = int(str(claims["exp"])) - int(str(claims["iat"]))
    reference: Any = claims.get("task")
    details: Any = claims.get("authorization_details")
    lines = [
        f"typ {jws.typ}, alg {jws.alg}, {life} s to live, in {got['milliseconds']} ms",
        *(f"{name:<10} {_short(claims.get(name))}" for name in ("iss", "sub", "client_id", "aud", "scope", "act")),
        *(f"{'cnf':<10} {name} {value}" for name, value in cnf.items()),
        *(f"{'task':<10} {name} {reference[name]}" for name in ("id", "root", "epoch", "authority_hash")),
        *(f"{'may':<10} {_detail(detail)}" for detail in details),
    ]
    return lines, {"typ": jws.typ, "seconds": life, "claims": claims, "milliseconds": got["milliseconds"]}


async def accepted(stage: Stage) -> Told:
    """Call the service with the SDK's client: mutual TLS and the token."""
    url = f"{stage.service_url}/tickets/{TICKET}"
    answer = await stage.kept["pod"].do("get", url=url)
    body = answer["body"]
    if answer["status"] != 200 or body.get("agent") != POD_ID or body.get("task") != stage.kept["task"]:
        raise NotHeld(f"the service answered {answer['status']} {json.dumps(body)}")
    lines = [
        f"GET {url}",
        f"  {answer['status']} in {answer['milliseconds']} ms, the TLS handshake included",
        f"  the service, {SERVICE_ID}, saw",
        f"    user   {body['user']}",
        f"    agent  {body['agent']}",
        f"    task   {body['task']}",
    ]
    return lines, {"status": answer["status"], "body": body, "milliseconds": answer["milliseconds"]}


def _detail(detail: Mapping[str, Any]) -> str:
    what = f" of {detail['identifier']}" if detail.get("identifier") else ""
    return f"{', '.join(detail['actions'])}{what} at {', '.join(detail['locations'])}"


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
