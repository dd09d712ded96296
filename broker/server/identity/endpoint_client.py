"""Asks a bundle endpoint, whichever profile it has: the only place from which this server dials another trust domain.

Invariants: only addresses that were configured, and redirects as far as their profile allows; https only, no proxy from the
environment, no cookies, no credentials; the endpoint is judged before a byte of the request is sent; ten seconds and one
MiB for everything together. What comes of a bundle is not decided here.
"""

import asyncio
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx2
from cryptography.hazmat.primitives.serialization import Encoding

from broker.clock import Clock
from broker.errors import InvalidSvid, Misconfigured, Refused, Unavailable
from broker.spiffe import Bundle, BundleSet
from broker.spiffe.federation import Profile, Relationship, is_reachable, redirected
from broker.transport.dialling import Trace, dialling
from broker.transport.tls import SvidPeer, client_context, judge

FETCH_SECONDS: Final = 10.0
"""From the name's look-up to the last byte, redirects included."""
MAX_DOCUMENT: Final = 1 << 20
"""Bytes of a bundle: one with some hundred authorities fits."""
MAX_REDIRECTS: Final = 3


class EndpointClient:
    """Fetches bundles."""

    def __init__(self, clock: Clock, web_ca_path: Path | None = None) -> None:
        """``web_ca_path``: PEM roots for https_web in place of the machine's own; raises Misconfigured."""
        self._clock = clock
        self._web_ca_path = web_ca_path
        if web_ca_path is not None:
            self._web_context()

    async def fetch(self, relationship: Relationship, trust: Bundle | None) -> Bundle:
        """Give the bundle that the endpoint serves now.

        ``trust`` is the bundle of the endpoint's own trust domain, for https_spiffe. Raises Unavailable, Refused,
        InvalidSvid (it is another endpoint), InvalidBundle.
        """
        context = self._context(relationship, trust)
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                document = await self._document(relationship, trust, context)
        except TimeoutError:
            raise Unavailable("the bundle endpoint did not answer in time", code="endpoint_slow") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise _unreachable(error) from error
        # The document does not name its trust domain: it is the one that was configured (TB-08).
        return Bundle.parse(relationship.trust_domain, document)

    async def _document(self, relationship: Relationship, trust: Bundle | None, context: ssl.SSLContext) -> bytes:
        url = relationship.url
        options = {"verify": context, "follow_redirects": False, "trust_env": False, "timeout": FETCH_SECONDS}
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        for _ in range(MAX_REDIRECTS + 1):
            # A client for each address: no connection and no cookie of one is there for another.
            async with (
                httpx2.AsyncClient(**options, headers=headers) as client,  # type: ignore[arg-type]
                dialling(self._judging(relationship, trust, url)) as trace,
                client.stream("GET", url, extensions={"trace": trace}) as response,
            ):
                if response.is_redirect and "location" in response.headers:
                    url = redirected(relationship, url, response.headers["location"])
                    continue
                return await _body(response)
        raise Refused(f"the bundle endpoint redirects more than {MAX_REDIRECTS} times", code="redirect_refused")

    def _judging(self, relationship: Relationship, trust: Bundle | None, url: str) -> Trace:
        """Give what looks at a connection while it is made: after TCP its address, after TLS whom it leads to."""

        async def traced(event: str, facts: Mapping[str, Any]) -> None:
            stream = facts.get("return_value")
            try:
                if event == "connection.connect_tcp.complete":
                    _require_reachable(relationship, url, stream.get_extra_info("server_addr"))  # type: ignore[union-attr]
                elif event == "connection.start_tls.complete" and trust is not None:
                    self._judge(relationship, trust, stream.get_extra_info("ssl_object"))  # type: ignore[union-attr]
            except (Refused, InvalidSvid):
                await stream.aclose()  # type: ignore[union-attr]  # its contract
                raise

        return traced

    def _judge(self, relationship: Relationship, trust: Bundle, ssl_object: ssl.SSLObject) -> None:
        peer = judge(ssl_object, BundleSet.of(trust), self._clock.now())
        shown = peer.svid.id if isinstance(peer, SvidPeer) else None
        if shown != relationship.endpoint_id:
            raise InvalidSvid(
                f"the bundle endpoint is {shown}, not {relationship.endpoint_id}", code="endpoint_unexpected"
            )

    def _context(self, relationship: Relationship, trust: Bundle | None) -> ssl.SSLContext:
        if relationship.profile is Profile.HTTPS_WEB:
            return self._web_context()
        if trust is None or not trust.x509_authorities:
            raise Unavailable(
                "can't perform SPIFFE Authentication: local copy of bundle not found",
                code="endpoint_bundle_missing",
                hint="give the endpoint's bundle with the relationship, or by: broker bundle set",
            )
        roots = [authority.public_bytes(Encoding.DER) for authority in trust.x509_authorities]
        context = client_context(None, roots)
        # Other implementations may stop at 1.2: the profile asks for Mozilla's intermediate level, not more.
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    def _web_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=None if self._web_ca_path is None else str(self._web_ca_path))
        except (OSError, ssl.SSLError):
            raise Misconfigured(
                "web_ca_path of federation cannot be read",
                code="federation_ca",
                hint="it must be a PEM file of CA certificates",
            ) from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


def _require_reachable(relationship: Relationship, url: str, address: tuple[Any, ...]) -> None:
    if not is_reachable(relationship, url, str(address[0])):
        raise Refused("a redirect into a private network was not followed", code="redirect_refused")


async def _body(response: httpx2.Response) -> bytes:
    if response.status_code != httpx2.codes.OK:
        raise Unavailable(f"the bundle endpoint answered with status {response.status_code}", code="endpoint_status")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise Unavailable("the bundle endpoint encoded its answer", code="endpoint_encoding")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_DOCUMENT:
            raise Unavailable("the bundle endpoint's answer is too large", code="endpoint_too_large")
    return bytes(body)


def _unreachable(error: Exception) -> Unavailable:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Unavailable(
                f"the bundle endpoint's certificate does not verify: {cause.verify_message}",
                code="endpoint_untrusted",
                hint="if it shows an X.509-SVID, its profile is https_spiffe",
            )
        cause = cause.__cause__ or cause.__context__
    return Unavailable(f"the bundle endpoint cannot be reached: {type(error).__name__}", code="endpoint_unreachable")
