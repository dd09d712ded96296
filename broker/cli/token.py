"""``broker token``: look into a token without trusting it, verify it offline, exchange one, give one back.

Looking and verifying need no server.
"""

import json
from datetime import UTC, datetime
from typing import Any

import click

from broker.cli.inputs import read_file, read_token
from broker.cli.options import noun, option, settings
from broker.cli.output import Column, Shape, moment, timestamp
from broker.cli.token_requests import exchange, revoke

INSPECTED = Shape(
    "token",
    "tokens",
    (Column("verified", "verified"), Column("header", "header"), Column("claims", "claims")),
    name="verified",
)
VERIFIED = Shape(
    "verified_token",
    "verified_tokens",
    (
        Column("user", "user"),
        Column("agent", "agent"),
        Column("task", "task"),
        Column("audience", "audience"),
        Column("scope", "scope"),
        Column("expires", "expires_at"),
        Column("bound to", "cnf"),
        Column("token id", "jti", wide=True),
    ),
    name="jti",
)
MAX_KEYS_BYTES = 64 * 1024
FETCH_SECONDS = 5.0
_DATES = ("exp", "iat", "nbf", "auth_time")

COMMAND = noun("token", "Task tokens: look into them, verify them, exchange and revoke them.")
COMMAND.add_command(exchange)
COMMAND.add_command(revoke)


@COMMAND.command("inspect")
@click.argument("token", default="-", metavar="[TOKEN|@FILE|-]")
def inspect(token: str) -> None:
    """Show what any JWT says. Nothing is verified: it may be forged, expired or ended."""
    here = settings()
    header, claims = _parts(read_token(token, "a token", here.shown))
    if here.shown.format is None:
        here.shown.raw("header " + json.dumps(header, indent=2, ensure_ascii=True))
        here.shown.raw("claims " + json.dumps(claims, indent=2, ensure_ascii=True))
    else:
        here.shown.one(INSPECTED, {"verified": False, "header": header, "claims": claims})
    for name in _DATES:
        value = claims.get(name)
        if isinstance(value, int) and 0 < value < 253402300800:
            here.shown.talk(f"{name}: {timestamp(datetime.fromtimestamp(value, UTC))}")
    here.shown.talk("NOT VERIFIED: this is what the token says, not what is true")
    here.shown.next("broker token verify --audience A --issuer I --keys FILE|URL")


@COMMAND.command("verify")
@click.argument("token", default="-", metavar="[TOKEN|@FILE|-]")
@option("--audience", required=True, help="The service it must be for.")
@option("--issuer", required=True, help="The broker that must have issued it.")
@option("--keys", required=True, metavar="FILE|URL", help="The issuer's key set: a file, or an https URL.")
@option("--cacert", envvar="BROKER_CACERT", type=click.Path(dir_okay=False), help="PEM roots for the URL.")
def verify(token: str, audience: str, issuer: str, keys: str, cacert: str | None) -> None:
    """Verify signature and claims of a task token. Exit code 5: refused.

    Whether its task still runs, and whether its holder is the one it is bound to, only the service that is called can tell.
    """
    from broker.clock import SystemClock  # noqa: PLC0415 - imports cryptography from here on
    from broker.errors import BrokerError, InvalidToken  # noqa: PLC0415
    from broker.tasks import Resource, verify_task_token  # noqa: PLC0415
    from broker.tasks.keyset import read_keys  # noqa: PLC0415

    here = settings()
    text = read_token(token, "a token", here.shown)
    document = _fetch(keys, cacert) if keys.startswith("https://") else read_file(keys, "the key set")
    wanted = Resource(audience)
    known = read_keys(document)
    try:
        found = verify_task_token(text, known, issuer=issuer, audience=wanted, now=SystemClock().now())
    except BrokerError as error:
        raise InvalidToken(
            error.message, code=error.reason, hint=error.hint or "broker token inspect shows it"
        ) from None
    here.shown.one(VERIFIED, _row(found))
    here.shown.talk("signature and claims hold; binding and state are judged where it is used")


def _row(found: Any) -> dict[str, Any]:
    payload = found.claims.to_payload()
    return {
        "jti": found.jti,
        "user": found.user,
        "agent": str(found.agent),
        "task": found.task_id,
        "root": found.root,
        "audience": payload["aud"],
        "scope": payload.get("scope"),
        "expires_at": moment(payload["exp"]),
        "cnf": payload["cnf"],
        "claims": payload,
    }


def _parts(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cut any JWT; unlike a verifier this takes every header, so that a refused token can be looked at."""
    from broker.errors import BrokerError, Invalid  # noqa: PLC0415
    from broker.spiffe import strictjson  # noqa: PLC0415
    from broker.spiffe.jose import MAX_TOKEN, b64url_decode  # noqa: PLC0415

    parts = token.split(".")
    if len(parts) != 3 or len(token) > 4 * MAX_TOKEN:
        raise Invalid("this is not a JWT: it does not have three parts", code="token_malformed", hint="paste all of it")
    try:
        header, claims = (strictjson.loads(b64url_decode(part)) for part in parts[:2])
    except BrokerError as error:
        raise Invalid(f"this is not a JWT: {error.message}", code="token_malformed") from None
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise Invalid("this is not a JWT: header and claims must be JSON objects", code="token_malformed")
    return header, claims


def _fetch(url: str, cacert: str | None) -> str:
    from broker.errors import Misconfigured, Unavailable  # noqa: PLC0415

    try:
        import httpx2  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise Misconfigured(
            "keys from a URL need httpx2, which is not installed",
            hint="pip install 'identity-broker[http]', or save the key set and name the file",
        ) from None
    import ssl  # noqa: PLC0415

    try:
        context = ssl.create_default_context(cafile=cacert)
        with httpx2.Client(verify=context, trust_env=False, follow_redirects=False, timeout=FETCH_SECONDS) as client:
            answer = client.get(url)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise Unavailable(
            f"{url} cannot be read: {error}", code="keys_unavailable", hint="is it up, and does --cacert name its root?"
        ) from None
    if answer.status_code != httpx2.codes.OK or len(answer.content) > MAX_KEYS_BYTES:
        raise Unavailable(f"{url} answers {answer.status_code}, no key set", code="keys_unavailable")
    return answer.text
