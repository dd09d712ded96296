"""An OAuth client that nobody here wrote: Authlib finds everything by the metadata, exchanges over mutual TLS, and the token works.

It knows the issuer's address, an SVID in files, and the roots; nothing else of this product.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from authlib.integrations.requests_client import OAuth2Session
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata, get_well_known_url
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import load_der_x509_certificate

from tests.attacks.tasks.outward_rig import TRIAGE, Rig, rig

pytestmark = pytest.mark.timeout(180)

EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"


@asynccontextmanager
async def service(house: Rig, port: int, audience: str) -> AsyncIterator[None]:
    """The demo's HTTPS service, as a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "broker.dev.service", "--issuer", house.issuer, "--audience", audience, "--port", str(port),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "SPIFFE_ENDPOINT_SOCKET": f"unix:{house.agent.socket}"},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        assert said.get("ready"), said
        yield
    finally:
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 30)


def in_files(house: Rig, directory: Path) -> tuple[tuple[str, str], str]:
    """Write the SVID and the roots as any TLS client wants them."""
    chain, key, roots = house.files[TRIAGE]
    files = [directory / name for name in ("svid.pem", "svid.key", "roots.pem")]
    files[0].write_bytes(b"".join(load_der_x509_certificate(one).public_bytes(Encoding.PEM) for one in chain))
    files[1].touch(0o600)
    files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    files[2].write_bytes(b"".join(load_der_x509_certificate(one).public_bytes(Encoding.PEM) for one in roots))
    return (str(files[0]), str(files[1])), str(files[2])


def discovered(issuer: str, roots: str) -> AuthorizationServerMetadata:
    """Read the metadata as RFC 8414 says, and hold every member against Authlib's own rules."""
    url = get_well_known_url(issuer, external=True, suffix="oauth-authorization-server")
    metadata = AuthorizationServerMetadata(requests.get(url, verify=roots, timeout=30).json())
    for member in AuthorizationServerMetadata.REGISTRY_KEYS:
        # Authlib takes an empty list for a missing one. There is no response type that this server could name truly.
        if member != "response_types_supported":
            getattr(metadata, f"validate_{member}")()
    assert metadata["issuer"] == issuer
    return metadata


def exchanged(metadata: AuthorizationServerMetadata, files: tuple[str, str], roots: str, **form: str) -> dict[str, Any]:
    assert EXCHANGE in metadata["grant_types_supported"]
    assert "tls_client_auth" in metadata["token_endpoint_auth_methods_supported"]
    # Of a client without a secret Authlib sends the client_id; the certificate is what proves it (RFC 8705 §2).
    client = OAuth2Session(client_id=str(TRIAGE), token_endpoint_auth_method="none")
    client.cert, client.verify, client.trust_env = files, roots, False
    with client:
        return dict(client.fetch_token(metadata["token_endpoint"], grant_type=EXCHANGE, **form))


async def test_an_exchange_by_the_metadata_alone(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    audience = f"https://localhost:{port}"
    async with rig(audience) as house, service(house, port, audience):
        files, roots = in_files(house, tmp_path)
        metadata = await asyncio.to_thread(discovered, house.issuer, roots)
        form = {
            "subject_token": house.user_token(),
            "subject_token_type": ID_TOKEN,
            "resource": audience,
            "scope": "ticket.read",
        }
        token = await asyncio.to_thread(exchanged, metadata, files, roots, **form)
        assert (token["token_type"], token["scope"]) == ("Bearer", "ticket.read")
        assert token["expires_at"] > 0

        with_token = {"authorization": f"Bearer {token['access_token']}"}
        answer = await house.clients[TRIAGE].get(f"{audience}/tickets/4711", headers=with_token)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["user"], answer.json()["agent"]) == ("alice", str(TRIAGE))

        introspected = await asyncio.to_thread(introspect, metadata, files, roots, token["access_token"])
        assert introspected["active"] is True
        await asyncio.to_thread(revoke, metadata, files, roots, token["access_token"])
        introspected = await asyncio.to_thread(introspect, metadata, files, roots, token["access_token"])
        assert introspected == {"active": False}


def introspect(metadata: AuthorizationServerMetadata, files: tuple[str, str], roots: str, token: str) -> Any:
    with OAuth2Session(client_id=str(TRIAGE), token_endpoint_auth_method="none") as client:
        client.cert, client.verify, client.trust_env = files, roots, False
        return client.introspect_token(metadata["introspection_endpoint"], token=token).json()


def revoke(metadata: AuthorizationServerMetadata, files: tuple[str, str], roots: str, token: str) -> None:
    with OAuth2Session(client_id=str(TRIAGE), token_endpoint_auth_method="none") as client:
        client.cert, client.verify, client.trust_env = files, roots, False
        answer = client.revoke_token(metadata["revocation_endpoint"], token=token, token_type_hint="access_token")
        assert answer.status_code == 200, (
            answer.text,
            [pair.split("=")[0] for pair in str(answer.request.body).split("&")],
        )
