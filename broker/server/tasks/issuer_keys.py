"""The keys of one OpenID issuer: fetched by a guarded client, kept, and never lost to a bad answer.

Invariants: only https, no redirect, no proxy from the environment, 64 KiB and 3 s for each document; the discovery document
must name the issuer itself; where it names keys at another host, that host is one of the world's, whatever its name resolves
to; a key is bound to one algorithm when it is read; the last good keys stay when a fetch fails, but not for ever. What a token
says is not known here.
"""

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import httpx2
from cryptography.hazmat.primitives.asymmetric import ec

from broker.clock import Clock
from broker.errors import InvalidJson, InvalidToken, Misconfigured, Unavailable
from broker.server.tasks.config import SubjectIssuer, Transmitter, check_https
from broker.spiffe import jose, strictjson
from broker.spiffe.federation import is_public
from broker.spiffe.jose import PublicKey
from broker.spiffe.strictjson import JsonValue
from broker.transport.dialling import dialling

MAX_DOCUMENT: Final = 64 * 1024
"""Bytes of a discovery document or key set: real ones have 2 to 10 KiB."""
FETCH_SECONDS: Final = 3.0
"""For one document, from dialling to the last byte: a caller waits for it."""
REFRESH_EVERY: Final = 10.0
"""Seconds between two fetches: a flood of unknown key ids must not become a flood at the issuer."""
RETRY_EVERY: Final = 1.0
"""Seconds between two attempts while nothing at all is known, as when both sides start."""
FRESH: Final = 600.0
"""Seconds after which keys are fetched again beside the work, so that a withdrawn key is noticed."""
LAST_GOOD: Final = 86400.0
"""Seconds after which keys that could not be fetched again are no longer believed."""
MAX_KEYS: Final = 64
"""More is a flood, not a rotation."""

_NATURAL: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """A public key and the one algorithm it may be used with (RFC 8725 §3.1)."""

    algorithm: str
    key: PublicKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Kept:
    keys: Mapping[str, IssuerKey]
    fetched_at: float


class IssuerKeys:
    """One issuer's keys. Close it with :meth:`aclose`."""

    def __init__(
        self, issuer: SubjectIssuer | Transmitter, clock: Clock, *, discovery: str = "", address: str = ""
    ) -> None:
        """Prepare the client; nothing is fetched yet. Raises Misconfigured for an unreadable ``ca_path``.

        ``discovery`` is where the document that names the keys lies, if not where OpenID Connect says; ``address`` that of
        the keys, where nothing has to be looked up.
        """
        self._issuer = issuer.issuer
        self._discovery = discovery or issuer.issuer.rstrip("/") + "/.well-known/openid-configuration"
        self._address = address
        self._clock = clock
        self._client = httpx2.AsyncClient(
            verify=trust_of(issuer),
            follow_redirects=False,
            trust_env=False,
            timeout=FETCH_SECONDS,
            headers={"accept": "application/json", "accept-encoding": "identity"},
        )
        self._kept: _Kept | None = None
        self._tried_at: float | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._closed = False

    async def aclose(self) -> None:
        """End a fetch under way, whoever waits for it, and close the connections. None is begun afterwards."""
        self._closed = True
        if self._fetching is not None and not self._fetching.done():
            self._fetching.cancel()
            await asyncio.wait((self._fetching,))
        await self._client.aclose()

    async def find(self, kid: str | None) -> IssuerKey:
        """Give the key of this id, or the only key for a token without id.

        Raises:
            InvalidToken: the issuer has no such key.
            Unavailable: the issuer's keys cannot be had now.
        """
        kept = self._current()
        found = _pick(kept, kid)
        if found is None:
            if (fetching := self._fetch()) is not None:
                # Whoever stops waiting leaves it to the others.
                await asyncio.wait((fetching,))
                found = _pick(self._current(), kid)
        elif kept is not None and self._clock.monotonic() - kept.fetched_at > FRESH:
            self._fetch()
        if found is not None:
            return found
        if self._current() is None:
            raise Unavailable("the user's issuer cannot be reached", code="issuer_unavailable", hint="try again")
        raise InvalidToken("the token's key is not one of its issuer's", code="subject_key_unknown")

    def _current(self) -> _Kept | None:
        kept = self._kept
        if kept is not None and self._clock.monotonic() - kept.fetched_at > LAST_GOOD:
            return None
        return kept

    def _fetch(self) -> asyncio.Task[None] | None:
        """Give the fetch under way, or begin one; None where it is not time for one."""
        if self._fetching is not None and not self._fetching.done():
            return self._fetching
        if not self._may_fetch():
            return None
        self._fetching = asyncio.create_task(self._refresh(), name="broker-issuer-keys")
        return self._fetching

    def _may_fetch(self) -> bool:
        if self._closed or self._tried_at is None:
            return not self._closed
        pause = RETRY_EVERY if self._current() is None else REFRESH_EVERY
        return self._clock.monotonic() - self._tried_at >= pause

    async def _refresh(self) -> None:
        """Fetch; what cannot be fetched or read leaves the last good keys in place."""
        self._tried_at = self._clock.monotonic()
        try:
            keys = await self._fetch_keys()
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, InvalidJson, Misconfigured, Unavailable, OSError):
            return
        self._kept = _Kept(keys, self._clock.monotonic())

    async def _fetch_keys(self) -> Mapping[str, IssuerKey]:
        if self._address:
            return _read_keys(await self._document(self._address))
        discovery = await self._document(self._discovery)
        # OpenID Connect Discovery §4.3: exactly the issuer that was asked.
        if discovery.get("issuer") != self._issuer:
            raise Unavailable("the discovery document is another issuer's", code="issuer_mismatch")
        address = discovery.get("jwks_uri")
        if not isinstance(address, str):
            raise Unavailable("the discovery document names no keys", code="issuer_keys")
        check_https(address.partition("?")[0], "the address of the issuer's keys")
        return _read_keys(await self._document(address))

    async def _document(self, url: str) -> dict[str, JsonValue]:
        body = bytearray()
        # NOTE(security): a name that the issuer's document gives must not lead into our network. The address that was dialled
        # counts, since a name may lead elsewhere the next time. Whoever configured a host knows where it is.
        is_told = bool(self._address) or _host(url) == _host(self._discovery)
        async with (
            asyncio.timeout(FETCH_SECONDS),
            dialling(None if is_told else _outside) as trace,
            self._client.stream("GET", url, extensions={"trace": trace}) as response,
        ):
            if response.status_code != httpx2.codes.OK:
                raise Unavailable("the issuer did not give the document", code="issuer_status")
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_DOCUMENT:
                    raise Unavailable("the issuer's document is too large", code="issuer_too_large")
        document = strictjson.loads(bytes(body), max_bytes=MAX_DOCUMENT)
        if not isinstance(document, dict):
            raise Unavailable("the issuer's document is not a JSON object", code="issuer_document")
        return document


def _host(url: str) -> str | None:
    return urlsplit(url).hostname


async def _outside(event: str, facts: Mapping[str, Any]) -> None:
    """Refuse a connection, once it is made, that leads to this machine or into a private network."""
    if event != "connection.connect_tcp.complete":
        return
    stream = facts["return_value"]
    if not is_public(str(stream.get_extra_info("server_addr")[0])):
        await stream.aclose()
        raise Unavailable(
            "the issuer's keys are said to be in a private network",
            code="issuer_keys",
            hint="if they are, an operator says so: jwks_url under [[server.subjects]]",
        )


def _pick(kept: _Kept | None, kid: str | None) -> IssuerKey | None:
    if kept is None:
        return None
    if kid is None:
        return next(iter(kept.keys.values())) if len(kept.keys) == 1 else None
    return kept.keys.get(kid)


def _read_keys(document: Mapping[str, JsonValue]) -> Mapping[str, IssuerKey]:
    listed = document.get("keys")
    if not isinstance(listed, list) or len(listed) > MAX_KEYS:
        raise Unavailable("the issuer's key set is not one", code="issuer_keys")
    keys: dict[str, IssuerKey] = {}
    twice: set[str] = set()
    for jwk in listed:
        read = _read_key(jwk) if isinstance(jwk, dict) else None
        if read is None:
            continue
        kid, key = read
        # Two keys under one id: which one is meant is not for us to guess.
        if kid in keys:
            twice.add(kid)
        keys[kid] = key
    usable = {kid: key for kid, key in keys.items() if kid not in twice}
    if not usable:
        raise Unavailable("the issuer's key set holds no usable key", code="issuer_keys")
    return usable


def _read_key(jwk: Mapping[str, JsonValue]) -> tuple[str, IssuerKey] | None:
    """Read one signing key; None for a key of another purpose or kind, which an issuer may publish beside."""
    kid, use, operations = jwk.get("kid", ""), jwk.get("use", "sig"), jwk.get("key_ops", ["verify"])
    if not isinstance(kid, str) or use != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    try:
        key = jose.public_key_from_jwk(jwk)
    except InvalidToken:
        return None
    algorithm = _algorithm(key, jwk.get("alg"))
    return None if algorithm is None else (kid, IssuerKey(algorithm, key))


def _algorithm(key: PublicKey, declared: JsonValue) -> str | None:
    if isinstance(key, ec.EllipticCurvePublicKey):
        natural = _NATURAL.get(key.curve.name)
        return natural if declared in (None, natural) else None
    if declared is None:
        # What every issuer that leaves it out means (OpenID Connect Core §15.1).
        return "RS256"
    return declared if isinstance(declared, str) and declared in _RSA else None


def trust_of(issuer: SubjectIssuer | Transmitter) -> ssl.SSLContext:
    """Give what its certificate is judged by; raises Misconfigured for an unreadable ``ca_path``."""
    try:
        context = ssl.create_default_context(cafile=None if issuer.ca_path is None else str(issuer.ca_path))
    except (OSError, ssl.SSLError):
        raise Misconfigured(
            f"ca_path of the subject issuer {issuer.issuer} cannot be read",
            code="subject_ca",
            hint="it must be a PEM file of CA certificates",
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
