"""What an operator may set for attestation by certificate, and the files that the agent's half is given."""

import json

import pytest
from pydantic import ValidationError

from attestors.node.x509pop import X509PopServer, X509PopServerSettings
from broker.attestation.contract import AttestorFailed
from broker.errors import Misconfigured
from tests.unit.attestors.x509pop_rig import MIDDLE, ROOT, agent, text

__all__ = ["agent"]  # the fixture


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "ca_bundle_path"),
        ({"ca_bundle_path": "/a", "ca_bundle_paths": ["/b"]}, "one of"),
        ({"mode": "spiffe", "ca_bundle_path": "/a"}, "own bundle"),
        ({"mode": "other"}, "mode"),
        ({"mode": "spiffe", "svid_prefix": ""}, "never empty"),
        ({"mode": "spiffe", "svid_prefix": "/"}, "never empty"),
        ({"mode": "spiffe", "svid_prefix": "/a//b"}, "path"),
        ({"mode": "spiffe", "max_intermediates": 0}, "max_intermediates"),
        ({"mode": "spiffe", "max_rsa_key_size": 16384}, "max_rsa_key_size"),
        ({"mode": "spiffe", "verify_client_ip": True}, "verify_client_ip"),
        ({"ca_bundle_path": "/a", "agent_path_template": "x509pop/{{ .SVIDPathTrimmed }}"}, "no field"),
        ({"ca_bundle_path": "/a", "agent_path_template": "x509pop/{{ .Issuer.CommonName }}"}, "no field"),
        ({"ca_bundle_path": "/a", "agent_path_template": "x509pop/{{ .Fingerprint | upper }}"}, "only letters"),
        ({"ca_bundle_path": "/a", "agent_path_template": "cn/{{ .Subject.CommonName }}"}, "starts with"),
        ({"ca_bundle_path": "/a", "agent_path_template": "{{ .Subject.CommonName }}/x"}, "starts with"),
        ({"ca_bundle_path": "/a", "agent_path_template": "{{ .PluginName }}/all"}, "one name"),
        ({"ca_bundle_path": "/a", "agent_path_template": "{{ .PluginName }}/{{ .URISanSelectors. }}"}, "no field"),
    ],
)
def test_settings_that_stop_the_start(settings, says) -> None:
    with pytest.raises(ValidationError, match=says):
        X509PopServerSettings(**settings)


@pytest.mark.parametrize("content", [None, b"", b"hello", ROOT.node().pem, ROOT.pem + MIDDLE.node().pem])
def test_a_bundle_holds_authorities(tmp_path, content) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Misconfigured, match=r"ca\.pem"):
        X509PopServer(X509PopServerSettings(ca_bundle_path=path))


async def test_the_agents_files_are_judged(agent, tmp_path) -> None:
    node, other = MIDDLE.node(), MIDDLE.node()
    one = agent(node)
    for name, content in (
        ("key.pem", other.key_pem()),
        ("key.pem", b"SECRET"),
        ("chain.pem", b""),
        ("key.pem", None),
    ):
        node.write(tmp_path)
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(AttestorFailed) as failed:
            await one.evidence()
        assert "SECRET" not in str(failed.value)


@pytest.mark.parametrize(
    "challenge", [b"", b"{}", b'{"rsa_signature":{"nonce":"AA=="}}', b'{"ecdsa_signature":{"nonce":"AA=="}}']
)
async def test_the_agent_signs_nothing_else(agent, challenge) -> None:
    one = agent(MIDDLE.node())
    await one.evidence()
    with pytest.raises(AttestorFailed):
        await one.respond(challenge)


async def test_the_agent_signs_once_for_each_evidence(agent) -> None:
    one = agent(MIDDLE.node())
    challenge = json.dumps({"ecdsa_signature": {"nonce": text(b"\1" * 32)}}).encode()
    with pytest.raises(AttestorFailed):
        await one.respond(challenge)
    await one.evidence()
    await one.respond(challenge)
    with pytest.raises(AttestorFailed):
        await one.respond(challenge)
