"""The client certificate that a proxy in front of us forwards (Envoy's ``x-forwarded-client-cert``): believed of pinned proxies only.

From anybody else the header is text that a stranger wrote, and nobody reads it. A pinned proxy must set it itself
(``SANITIZE_SET``) with the whole chain; the chain is then judged here, like one of our own handshake.
"""

import binascii
import re
from datetime import datetime
from typing import Final
from urllib.parse import unquote

from starlette.requests import Request

from broker.errors import Invalid
from broker.spiffe import BundleSet, X509Svid, verify_x509_svid
from broker.spiffe.chains import MAX_CHAIN

HEADER: Final = "x-forwarded-client-cert"
MAX_VALUE: Final = 32 * 1024
"""Longest value, in characters: a chain of four, PEM in percent-encoding."""

# One element: a second one is another hop's word. Quoted values may hold separators, ours do not need to.
_ELEMENT: Final = re.compile(r'[A-Za-z]+=(?:"[^"\\]*"|[^",;]*)(?:;[A-Za-z]+=(?:"[^"\\]*"|[^",;]*))*')
_PAIR: Final = re.compile(r'([A-Za-z]+)=(?:"([^"\\]*)"|([^",;]*))')
_PEM: Final = re.compile(r"-----BEGIN CERTIFICATE-----\s+([A-Za-z0-9+/=\s]+?)-----END CERTIFICATE-----\s*")


def forwarded_svid(request: Request, bundles: BundleSet, now: datetime) -> X509Svid | None:
    """Give the SVID of the client behind a pinned proxy, None where it showed no certificate; raises Invalid, InvalidSvid."""
    values = request.headers.getlist(HEADER)
    if not values:
        return None
    if len(values) > 1 or len(values[0]) > MAX_VALUE or _ELEMENT.fullmatch(values[0]) is None:
        raise _unreadable()
    members: dict[str, str] = {}
    for name, quoted, plain in _PAIR.findall(values[0]):
        if name.lower() in ("cert", "chain") and members.setdefault(name.lower(), quoted or plain) != (quoted or plain):
            raise _unreadable()
    text = members.get("chain") or members.get("cert")
    if not text:
        raise _unreadable()
    return verify_x509_svid(_chain(text), bundles, now=now)


def _chain(text: str) -> list[bytes]:
    pem = unquote(text)
    chain: list[bytes] = []
    at = 0
    while at < len(pem):
        block = _PEM.match(pem, at)
        if block is None or len(chain) == MAX_CHAIN:
            raise _unreadable()
        try:
            chain.append(binascii.a2b_base64("".join(block[1].split()), strict_mode=True))
        except ValueError:
            raise _unreadable() from None
        at = block.end()
    return chain


def _unreadable() -> Invalid:
    return Invalid(
        "the proxy's forwarded certificate cannot be read",
        code="forwarded_certificate",
        hint="the proxy sets x-forwarded-client-cert itself, once, with Cert and Chain",
    )
