"""Keys of an AWS role for a JWT-SVID: ``AssumeRoleWithWebIdentity`` of AWS's Security Token Service.

Set by the variables that AWS's own programs read: ``AWS_ROLE_ARN``, ``AWS_ROLE_SESSION_NAME``, ``AWS_REGION`` or
``AWS_DEFAULT_REGION``, ``AWS_ENDPOINT_URL_STS``, ``AWS_CA_BUNDLE``. No proxy is used.
"""

import http.client
import re
import ssl
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import SplitResult, urlencode, urlsplit
from xml.etree import ElementTree as ET

from broker.errors import BrokerError, Invalid, Refused, Unavailable

ANSWER_SECONDS: Final = 15.0
"""For the whole exchange: AWS's programs wait a minute for the command."""
MAX_ANSWER: Final = 64 * 1024
"""Bytes; a session token has some 2 KiB."""

_MEMBERS: Final = ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")
_ARN: Final = re.compile(r"arn:[a-z0-9-]{1,40}:iam::[0-9]{12}:role/[\w+=,.@/-]{1,576}", re.ASCII)
_REGION: Final = re.compile(r"[a-z]{2,12}(?:-[a-z0-9]{1,16}){1,4}")
_NOT_IN_SESSION: Final = re.compile(r"[^\w+=,.@-]+", re.ASCII)
_SESSION_LENGTH: Final = 64
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


def keys_for(token: str, spiffe_id: str, environ: Mapping[str, str]) -> Mapping[str, Any]:
    """Exchange the token; gives what ``credential_process`` prints.

    Raises:
        Invalid: the variables do not say which role, or where.
        Refused: AWS does not give the role for this token.
        Unavailable: AWS does not answer.
    """
    role = environ.get("AWS_ROLE_ARN", "")
    if _ARN.fullmatch(role) is None:
        raise Invalid(
            "AWS_ROLE_ARN names no role" if role else "AWS_ROLE_ARN is not set",
            code="aws_role",
            hint="credential_process = env AWS_ROLE_ARN=arn:aws:iam::111122223333:role/NAME broker svid jwt …",
        )
    form = {
        "Action": "AssumeRoleWithWebIdentity",
        "Version": "2011-06-15",
        "RoleArn": role,
        "RoleSessionName": environ.get("AWS_ROLE_SESSION_NAME") or session_name(spiffe_id),
        "WebIdentityToken": token,
    }
    status, body = _post(_endpoint(environ), urlencode(form), environ.get("AWS_CA_BUNDLE"))
    found = _elements(body)
    if status != http.client.OK:
        raise _refusal(status, found)
    try:
        return {"Version": 1, **{name: found[name] for name in _MEMBERS}}
    except KeyError:
        raise Unavailable(
            "AWS answered without keys", code="aws_answer", hint="is it AWS that answers there?"
        ) from None


def session_name(spiffe_id: str) -> str:
    """Give the name under which AWS's records show the session: the SPIFFE ID, as far as its alphabet goes."""
    return _NOT_IN_SESSION.sub("-", spiffe_id.removeprefix("spiffe://"))[-_SESSION_LENGTH:].strip("-")


def _endpoint(environ: Mapping[str, str]) -> SplitResult:
    given = environ.get("AWS_ENDPOINT_URL_STS", "")
    if given:
        url = urlsplit(given)
        # NOTE(security): what goes there is a token that anybody may use until it expires.
        if url.hostname and (url.scheme == "https" or (url.scheme == "http" and url.hostname in _LOOPBACK)):
            return url
        raise Invalid("AWS_ENDPOINT_URL_STS is no https URL", code="aws_endpoint", hint="https://sts.example.org")
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or ""
    if region and _REGION.fullmatch(region) is None:
        raise Invalid("AWS_REGION names no region", code="aws_region", hint="eu-central-1")
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return urlsplit(f"https://sts.{region}.{suffix}" if region else "https://sts.amazonaws.com")


def _post(url: SplitResult, body: str, roots: str | None) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "text/xml"}
    host = str(url.hostname)
    try:
        if url.scheme == "https":
            context = ssl.create_default_context(cafile=roots or None)
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, url.port, timeout=ANSWER_SECONDS, context=context
            )
        else:
            connection = http.client.HTTPConnection(host, url.port, timeout=ANSWER_SECONDS)
        try:
            connection.request("POST", url.path or "/", body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(MAX_ANSWER + 1)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unavailable(f"{host} cannot be asked: {error}", code="aws_unavailable", hint="try again") from None


def _elements(body: bytes) -> Mapping[str, str]:
    """Give the text of each element by its local name; nothing where it is no XML of a sane size."""
    # NOTE(security): entities are declared in a document type, and such an answer has none.
    if len(body) > MAX_ANSWER or b"<!" in body:
        return {}
    try:
        root = ET.fromstring(body)  # noqa: S314 - as above
    except (ET.ParseError, ValueError):
        return {}
    return {one.tag.rpartition("}")[2]: one.text.strip() for one in root.iter() if one.text}


def _refusal(status: int, found: Mapping[str, str]) -> BrokerError:
    said = f"{found.get('Code', 'no reason given')}: {found.get('Message', f'status {status}')}"
    if status >= http.client.INTERNAL_SERVER_ERROR or status == http.client.TOO_MANY_REQUESTS:
        return Unavailable(f"AWS cannot answer now: {said}", code="aws_unavailable", hint="try again")
    return Refused(
        f"AWS does not give the role: {said}",
        code="aws_refused",
        hint="the role's trust policy must name this issuer, audience and subject",
    )
