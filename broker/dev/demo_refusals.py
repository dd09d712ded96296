"""The third act of the demo: what must not work does not, and after the end nothing does."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from broker.dev.demo_identity import POD, POD_ID
from broker.dev.demo_task import DELETE, READ, TICKET
from broker.dev.stage import OTHER_AUDIENCE, NotHeld, Process, Stage
from broker.spiffe.jose import b64url_encode, parse_compact

PATH = f"/tickets/{TICKET}"
SLOWEST_MS = 1000.0
"""The end must be felt far sooner; a machine that is this slow shows nothing about the product."""

Told = tuple[Sequence[str], Mapping[str, Any]]


async def neighbour(stage: Stage) -> Told:
    """Another process of the same program, user and SPIFFE ID presents the stolen token with its own certificate."""
    other: Process = await stage.play("neighbour", POD, "broker.dev.pod")
    mine = await other.do("identity")
    if mine["spiffe_id"] != POD_ID or mine["x5t"] == stage.kept["pod_x5t"]:
        raise NotHeld("the neighbour is no second instance of the same workload")
    stage.kept["neighbour"] = other
    answer = await _present(other, stage, stage.kept["token"])
    refusal = _refused(answer, 401, {"binding_mismatch"}, "the stolen token was not refused")
    lines = [
        f"neighbour, pid {other.pid}: same program, same user, even the same identity",
        f"  {mine['spiffe_id']}",
        f"  its own key and certificate: x5t#S256 {mine['x5t']}",
        f"  the token's:                 x5t#S256 {stage.kept['pod_x5t']}",
        f"GET {PATH} with the stolen token: {refusal}",
    ]
    return lines, {"spiffe_id": mine["spiffe_id"], "x5t": mine["x5t"], "refusal": _fact(answer)}


async def widened(stage: Stage) -> Told:
    """More than the task was given: another action, another thing, another service, another audience."""
    pod: Process = stage.kept["pod"]
    url, token = stage.service_url, stage.kept["token"]
    wider = [{"type": "api", "locations": [url], "actions": [READ, DELETE], "identifier": TICKET}]
    asked = {
        "a token for one action more": await pod.try_("token", resource=url, authorization_details=wider),
        "a token for the scope of that action": await pod.try_("token", resource=url, scope=DELETE),
        "a token for a service outside the task": await pod.try_("token", resource="https://hr.dev.test"),
    }
    foreign = await pod.do("token", resource=OTHER_AUDIENCE)
    used = {
        f"DELETE {PATH}": (await _present(pod, stage, token, method="DELETE"), 403),
        "GET /tickets/4712": (await _present(pod, stage, token, path="/tickets/4712"), 403),
        "a good token of the same task for another service": (await _present(pod, stage, foreign["token"]), 401),
    }
    lines = ["at the broker"]
    for what, answer in asked.items():
        if "error" not in answer:
            raise NotHeld(f"the broker gave {what}")
        lines.append(f"  {what}: refused, {answer['error']['code']}")
    lines.append("at the service")
    for what, (answer, status) in used.items():
        lines.append(f"  {what}: {_refused(answer, status, None, f'{what} was not refused')}")
    facts = {
        "at_the_broker": {what: answer["error"]["code"] for what, answer in asked.items()},
        "at_the_service": {what: _fact(answer) for what, (answer, _) in used.items()},
    }
    return lines, facts


async def altered(stage: Stage) -> Told:
    """The thief rewrites the token: without its binding, and with the neighbour's own."""
    thief: Process = stage.kept["neighbour"]
    own = (await thief.do("identity"))["x5t"]
    stripped = await _present(thief, stage, _rewritten(stage.kept["token"], None))
    replaced = await _present(thief, stage, _rewritten(stage.kept["token"], {"x5t#S256": own}))
    lines = [
        f"cnf cut off:              {_refused(stripped, 401, None, 'a token without its binding was not refused')}",
        f"cnf set to the thief's:   {_refused(replaced, 401, None, 'a token with another binding was not refused')}",
        "only the broker can sign, and it binds what it signs",
    ]
    return lines, {"stripped": _fact(stripped), "replaced": _fact(replaced)}


async def end(stage: Stage) -> Told:
    """End the task while the pod calls without pause, and measure; then the task gives no token any more."""
    pod: Process = stage.kept["pod"]
    seen = await pod.do("watch", url=stage.service_url, path=PATH, token=stage.kept["token"])
    refusal = seen["refusal"]
    if seen["state"] != "completed" or refusal.get("status") != 401 or refusal.get("code") != "task_ended":
        raise NotHeld(f"after the end ({seen['state']}) the service answered {json.dumps(refusal)}")
    if seen["refused_after_ms"] > SLOWEST_MS:
        raise NotHeld(f"the first refusal came {seen['refused_after_ms']} ms after the end")
    again = await pod.try_("token", resource=stage.service_url)
    if "error" not in again:
        raise NotHeld("the ended task gave another token")
    after = seen["refused_after_ms"]
    when = f"{after} ms after the acknowledgement" if after >= 0 else f"{-after} ms before the acknowledgement arrived"
    lines = [
        f"calls accepted on one open connection before the end   {seen['accepted']}",
        f"end acknowledged, durable and announced                {seen['acknowledged_ms']} ms after it was asked for",
        f"first refusal seen by the caller                       {when}",
        f"calls accepted in between                              {seen['accepted_after_acknowledgement']}",
        f"the refusal                                            401 {refusal['code']}",
        f"another token of this task                             refused, {again['error']['code']}",
    ]
    return lines, {**seen, "another_token": again["error"]["code"]}


async def _present(
    process: Process, stage: Stage, token: str, *, method: str = "GET", path: str = PATH
) -> Mapping[str, Any]:
    return await process.do("present", url=stage.service_url, method=method, path=path, token=token)


def _refused(answer: Mapping[str, Any], status: int, codes: set[str] | None, otherwise: str) -> str:
    code = answer["body"].get("code")
    if answer["status"] != status or not code or (codes is not None and code not in codes):
        raise NotHeld(f"{otherwise}: {answer['status']} {json.dumps(answer['body'])}")
    return f"{status} {code}, in {answer['milliseconds']} ms"


def _fact(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"status": answer["status"], "code": answer["body"].get("code"), "milliseconds": answer["milliseconds"]}


def _rewritten(token: str, cnf: Mapping[str, str] | None) -> str:
    """Give the token with another ``cnf``, under the signature it had: who has no key can do no more."""
    header, _, signature = token.split(".")
    claims = {name: value for name, value in parse_compact(token).payload.items() if name != "cnf"}
    if cnf is not None:
        claims["cnf"] = dict(cnf)
    return f"{header}.{b64url_encode(json.dumps(claims, separators=(',', ':')).encode())}.{signature}"
