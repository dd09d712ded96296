"""What the tests of attestation by certificate share: a fleet's authorities, and both halves of the attestor."""

import base64
import hashlib
import json
from typing import Any

import pytest

from attestors.node.x509pop import X509PopAgent, X509PopServer, X509PopServerSettings, X509PopSettings
from broker.attestation.contract import AttestedNode, Evidence, Home
from broker.errors import NotAttested
from broker.spiffe import Bundle, TrustDomain
from tests.fakes.node_pki import Certified, root

TD = TrustDomain("example.org")
ROOT = root()
MIDDLE = ROOT.authority("Fleet Issuing")


def text(octets: bytes) -> str:
    return base64.b64encode(octets).decode()


def sha1(one: Certified) -> str:
    return hashlib.sha1(one.der).hexdigest()


def evidence(*chain: Certified) -> Evidence:
    return Evidence("x509pop", json.dumps({"certificates": [text(one.der) for one in chain]}).encode())


@pytest.fixture
def server(tmp_path):
    def make(*roots: Certified, clock=None, **settings: Any) -> X509PopServer:
        if settings.get("mode") != "spiffe":
            path = tmp_path / "ca.pem"
            path.write_bytes(b"".join(one.pem for one in roots or (ROOT,)))
            settings["ca_bundle_path"] = path
        made = X509PopServer(X509PopServerSettings(**settings), clock)
        made.settle(Home(TD, lambda: Bundle(TD, tuple(one.certificate for one in roots))))
        return made

    return make


@pytest.fixture
def agent(tmp_path):
    def make(node: Certified, *above: Certified, **settings: Any) -> X509PopAgent:
        return X509PopAgent(X509PopSettings(**node.write(tmp_path, *above), **settings))

    return make


async def attested(agent: X509PopAgent, server: X509PopServer) -> AttestedNode:
    return await server.verify(await agent.evidence(), agent.respond)


async def never(challenge: bytes) -> bytes:
    raise AssertionError("a chain that does not count is never challenged")


async def refused(server: X509PopServer, given: Evidence, respond=never) -> str:
    with pytest.raises(NotAttested) as why:
        await server.verify(given, respond)
    return why.value.reason
