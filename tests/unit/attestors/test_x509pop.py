"""Attestation by certificate, both halves, with real keys and real chains."""

import base64
import datetime as dt
import hashlib
import json
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.x509.oid import ExtendedKeyUsageOID

from attestors.node.x509pop import X509PopServer, X509PopServerSettings
from broker.attestation.contract import Evidence, Home, SettledAttestor
from broker.clock import SystemClock
from broker.spiffe import Bundle, Selector
from broker.spiffe.chains import MAX_SIGNATURES
from tests.fakes.costs import Costs
from tests.fakes.node_pki import Certified, ec_key, root, rsa_key
from tests.unit.attestors.x509pop_rig import (
    MIDDLE,
    ROOT,
    TD,
    agent,
    attested,
    evidence,
    refused,
    server,
    sha1,
    text,
)
from tests.unit.server.authority.world import StandingClock

__all__ = ["agent", "server"]  # the fixtures


KEYS = {
    "P-256": ec_key,
    "P-384": lambda: ec_key(ec.SECP384R1),
    "P-521": lambda: ec_key(ec.SECP521R1),
    "RSA-2048": rsa_key,
    "RSA-3072": lambda: rsa_key(3072),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
async def test_a_node_proves_its_key(agent, server, key) -> None:
    node = MIDDLE.node("node-7", key=key(), uris=["x509pop://example.org/site/berlin/3"], serial=0xABC)
    found = await attested(agent(node, MIDDLE), server())
    assert (found.path, found.reattestable, found.consumes) == (f"/x509pop/{sha1(node)}", True, None)
    assert found.selectors == {
        Selector("x509pop:subject:cn:node-7"),
        Selector("x509pop:serialnumber:0abc"),
        Selector("x509pop:san:site:berlin/3"),
        Selector(f"x509pop:ca:fingerprint:{sha1(MIDDLE)}"),
        Selector(f"x509pop:ca:fingerprint:{sha1(ROOT)}"),
    }


async def test_it_attests_again_and_reads_its_files_each_time(agent, server, tmp_path) -> None:
    judge, one = server(), agent(MIDDLE.node(), MIDDLE)
    first = await attested(one, judge)
    assert (await attested(one, judge)).path == first.path
    renewed = MIDDLE.node()
    renewed.write(tmp_path, MIDDLE)
    assert (await attested(one, judge)).path == f"/x509pop/{sha1(renewed)}" != first.path


async def test_intermediates_may_come_in_a_file_of_their_own(agent, server, tmp_path) -> None:
    (tmp_path / "more.pem").write_bytes(MIDDLE.pem)
    assert (await attested(agent(MIDDLE.node(), intermediates_path=tmp_path / "more.pem"), server())).path


async def test_several_bundles(agent, tmp_path) -> None:
    other = root("Other Root")
    files = (tmp_path / "one.pem", tmp_path / "two.pem")
    for file, authority in zip(files, (other, ROOT), strict=True):
        file.write_bytes(authority.pem)
    judge = X509PopServer(X509PopServerSettings(ca_bundle_paths=files))
    judge.settle(Home(TD, lambda: Bundle(TD)))
    node = MIDDLE.node()
    assert (await attested(agent(node, MIDDLE), judge)).path == f"/x509pop/{sha1(node)}"


def test_the_server_tells_it_of_its_trust_domain(server) -> None:
    assert isinstance(server(), SettledAttestor)


# ---- SPIRE's wire


def gos_response(key, challenge: bytes) -> bytes:
    """Answer as SPIRE's agent does: both members, the unused one null; RSA with the longest salt that fits."""
    asked = json.loads(challenge)
    kind = "rsa_signature" if isinstance(key, rsa.RSAPrivateKey) else "ecdsa_signature"
    assert asked == {"rsa_signature": None, "ecdsa_signature": None} | {kind: {"nonce": asked[kind]["nonce"]}}
    nonce = base64.b64decode(asked[kind]["nonce"])
    assert len(nonce) == 32
    own = b"\x07" * 32
    digest = hashlib.sha256(nonce + own).digest()
    pre = Prehashed(hashes.SHA256())
    if kind == "rsa_signature":
        longest = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)
        proof = {"nonce": text(own), "signature": text(key.sign(digest, longest, pre))}
    else:
        der = key.sign(digest, ec.ECDSA(pre))
        size = der[3]
        r, s = der[4 : 4 + size].lstrip(b"\0"), der[6 + size :].lstrip(b"\0")
        proof = {"nonce": text(own), "r": text(r), "s": text(s)}
    return json.dumps({"rsa_signature": None, "ecdsa_signature": None} | {kind: proof}).encode()


@pytest.mark.parametrize("key", [ec_key, rsa_key], ids=["EC", "RSA"])
async def test_an_agent_of_spire_is_understood(server, key) -> None:
    node = MIDDLE.node(key=key())

    async def respond(challenge: bytes) -> bytes:
        return gos_response(node.key, challenge)

    assert (await server().verify(evidence(node, MIDDLE), respond)).path == f"/x509pop/{sha1(node)}"


@pytest.mark.parametrize("kind", ["rsa_signature", "ecdsa_signature"])
async def test_a_server_of_spire_is_understood(agent, kind) -> None:
    node = MIDDLE.node(key=rsa_key() if kind == "rsa_signature" else ec_key())
    one = agent(node)
    assert json.loads((await one.evidence()).payload) == {"certificates": [text(node.der)]}
    nonce = b"\x01" * 32
    answer = json.loads(await one.respond(json.dumps({kind: {"nonce": text(nonce)}}).encode()))
    proof = {name: base64.b64decode(value) for name, value in answer[kind].items()}
    digest = hashlib.sha256(nonce + proof["nonce"]).digest()
    pre, public = Prehashed(hashes.SHA256()), node.key.public_key()
    if kind == "rsa_signature":
        assert proof.keys() == {"nonce", "signature"}
        auto = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.AUTO)
        public.verify(proof["signature"], digest, auto, pre)
    else:
        assert proof.keys() == {"nonce", "r", "s"}
        r, s = (int.from_bytes(proof[name]) for name in ("r", "s"))
        public.verify(encode_dss_signature(r, s), digest, ec.ECDSA(pre))


# ---- what is refused


@pytest.mark.bears("I12")
@pytest.mark.parametrize("key", [ec_key, rsa_key], ids=["EC", "RSA"])
async def test_a_response_serves_one_challenge_only(server, key) -> None:
    judge, node = server(), MIDDLE.node(key=key())
    seen: list[bytes] = []

    async def honest(challenge: bytes) -> bytes:
        seen.append(gos_response(node.key, challenge))
        return seen[0]

    await judge.verify(evidence(node, MIDDLE), honest)
    # The same node's, the same server's, another session's.
    assert await refused(judge, evidence(node, MIDDLE), honest) == "possession_not_proven"


async def test_another_key_proves_nothing(server) -> None:
    node, thief = MIDDLE.node(), MIDDLE.node()

    async def respond(challenge: bytes) -> bytes:
        return gos_response(thief.key, challenge)

    assert await refused(server(), evidence(node, MIDDLE), respond) == "possession_not_proven"


@pytest.mark.bears("I10")
@pytest.mark.parametrize(
    "change",
    [
        lambda good: b"",
        lambda good: b"[]",
        lambda good: b'{"ecdsa_signature":null}',
        lambda good: json.dumps(good | {"rsa_signature": good["ecdsa_signature"]}).encode(),
        lambda good: json.dumps(good | {"ECDSA_signature": good["ecdsa_signature"]}).encode(),
        lambda good: json.dumps({"rsa_signature": good["ecdsa_signature"]}).encode(),
        lambda good: b'{"ecdsa_signature":null,' + json.dumps(good).encode()[1:],  # the name twice
        lambda good: json.dumps({"ecdsa_signature": good["ecdsa_signature"] | {"nonce": ""}}).encode(),
        lambda good: json.dumps({"ecdsa_signature": good["ecdsa_signature"] | {"nonce": text(b"\0" * 33)}}).encode(),
        lambda good: json.dumps({"ecdsa_signature": good["ecdsa_signature"] | {"r": text(b"\1" * 67)}}).encode(),
        lambda good: json.dumps({"ecdsa_signature": good["ecdsa_signature"] | {"r": 5}}).encode(),
        lambda good: json.dumps({"ecdsa_signature": good["ecdsa_signature"] | {"x": ""}}).encode(),
    ],
)
async def test_a_response_has_one_meaning(server, change) -> None:
    node = MIDDLE.node()

    async def respond(challenge: bytes) -> bytes:
        return change(json.loads(gos_response(node.key, challenge)))

    assert await refused(server(), evidence(node, MIDDLE), respond) == "evidence_malformed"


@pytest.mark.parametrize(
    "values", [{"r": ""}, {"s": text(b"\0")}, {"r": text(b"\xff" * 66)}, {"nonce": text(b"\0" * 32)}]
)
async def test_a_wrong_signature_is_refused(server, values) -> None:
    node = MIDDLE.node()

    async def respond(challenge: bytes) -> bytes:
        good = json.loads(gos_response(node.key, challenge))
        return json.dumps({"ecdsa_signature": good["ecdsa_signature"] | values}).encode()

    assert await refused(server(), evidence(node, MIDDLE), respond) == "possession_not_proven"


@pytest.mark.bears("I10")
@pytest.mark.parametrize(
    "payload",
    [
        b"", b"null", b"[]", b"{}", b'{"certificates":[]}', b'{"certificates":null}', b'{"certificates":"MIIB"}',
        b'{"certificates":[5]}', b'{"certificates":["%"]}', b'{"Certificates":["AA=="]}', b'{"certificates":["AB=="]}',
        b'{"certificates":["AA=="],"Certificates":["AA=="]}', b'{"certificates":["AA=="],"certificates":["AQ=="]}',
    ],
)  # fmt: skip
async def test_the_evidence_has_one_meaning(server, payload) -> None:
    assert await refused(server(), Evidence("x509pop", payload)) == "evidence_malformed"


LATER = dt.timedelta(hours=2)
STRANGER = root("Stranger")
NAMESAKE = root("Fleet Root")
CASES = {
    "no authority of ours": (lambda: [STRANGER.node()], "certificate_untrusted"),
    "a namesake of our authority": (lambda: [NAMESAKE.node()], "certificate_untrusted"),
    "an intermediate is missing": (lambda: [MIDDLE.node()], "certificate_untrusted"),
    "expired": (lambda: [ROOT.node(life=-10)], "certificate_expired"),
    "not yet": (lambda: [ROOT.node(age=-600)], "certificate_not_yet_valid"),
    "an expired intermediate": (
        lambda: [(old := ROOT.authority("Old", life=-10)).node(), old],
        "certificate_expired",
    ),
    "an authority itself": (lambda: [MIDDLE], "certificate_leaf_is_ca"),
    "the root itself": (lambda: [ROOT], "certificate_leaf_is_ca"),
    "a node that signs a node": (lambda: [(one := ROOT.node()).node(), one], "certificate_issuer_not_ca"),
    "an authority that may not sign": (
        lambda: [(one := ROOT.authority("X", usage="crl_sign")).node(), one],
        "certificate_issuer_key_usage",
    ),
    "no key usage": (lambda: [ROOT.node(usage=None)], "certificate_key_usage"),
    "for other uses": (lambda: [ROOT.node(usage="key_encipherment")], "certificate_key_usage"),
    "Ed25519": (lambda: [ROOT.node(key=ed25519.Ed25519PrivateKey.generate())], "certificate_key_type"),
    "P-224": (lambda: [ROOT.node(key=ec_key(ec.SECP224R1))], "certificate_weak_key"),
    "RSA-1024": (lambda: [ROOT.node(key=rsa_key(1024))], "certificate_weak_key"),
    "no certificate": (lambda: [type("Bytes", (), {"der": b"0\x00"})], "certificate_malformed"),
}


@pytest.mark.parametrize(("chain", "code"), CASES.values(), ids=CASES)
async def test_chains_that_do_not_count(server, chain, code) -> None:
    assert await refused(server(), evidence(*chain())) == code


async def test_the_clock_decides(server) -> None:
    clock = StandingClock(SystemClock().now() + LATER)
    assert await refused(server(clock=clock), evidence(ROOT.node())) == "certificate_expired"


async def test_extended_usages_are_the_operators_own(agent, server) -> None:
    middle = ROOT.authority("Clients", extra=[x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])])
    node = middle.node(extra=[x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])])
    assert (await attested(agent(node, middle), server())).path


# ---- what it may cost


@pytest.mark.bears("I12")
async def test_a_thousand_certificates_cost_nothing(server, monkeypatch) -> None:
    given = evidence(*[MIDDLE.node()] * 1000)
    costs = Costs.of(given.payload, monkeypatch)
    assert await refused(server(), given) == "evidence_malformed"  # larger than any evidence may be
    assert costs == Costs()
    tiny = Evidence("x509pop", json.dumps({"certificates": ["AA=="] * 1000}).encode())
    costs = Costs.of(tiny.payload, monkeypatch)
    assert await refused(server(), tiny) == "certificate_chain_length"
    assert costs == Costs(json=1)


async def test_one_intermediate_too_many(server) -> None:
    chain = [MIDDLE.node(), *[MIDDLE] * 3]
    assert await refused(server(max_intermediates=2), evidence(*chain)) == "certificate_chain_length"


def large(bits: int, exponent: int = 65537) -> rsa.RSAPublicKey:
    # Making such a key takes minutes; nobody needs the private half to send the public one.
    return rsa.RSAPublicNumbers(exponent, (1 << (bits - 1)) | (1 << 200) | 1).public_key()


class PublicOnly:
    """A key pair of which only the public half exists."""

    def __init__(self, public: rsa.RSAPublicKey) -> None:
        self.public_key = lambda: public


@pytest.mark.bears("I12")
@pytest.mark.parametrize(
    ("bits", "exponent", "code"),
    [
        (16384, 65537, "certificate_key_size"),
        (8200, 65537, "certificate_key_size"),
        (3072, (1 << 3000) + 1, "certificate_key_size"),
    ],
)
async def test_a_large_rsa_key_is_refused_unused(server, monkeypatch, bits, exponent, code) -> None:
    node = ROOT.node(key=PublicOnly(large(bits, exponent)))
    middle = ROOT.authority("Large", key=PublicOnly(large(bits, exponent)))
    for chain in ([node], [MIDDLE.node(), middle]):
        given = evidence(*chain)
        costs = Costs.of(given.payload, monkeypatch)
        assert await refused(server(), given) == code
        assert costs.signatures == 0


@pytest.mark.bears("I12")
@pytest.mark.parametrize("key", [lambda: ec_key(ec.SECP521R1), lambda: rsa_key(4096)], ids=["P-521", "RSA-4096"])
async def test_the_dearest_chain_that_is_allowed(server, monkeypatch, key) -> None:
    # Authorities of one name and one key all vouch for each other: factorially many paths, and none is ours.
    pair = key()
    ring = [root("Alike", key=pair) for _ in range(7)]
    given = evidence(ring[0].node(), *ring)
    costs = Costs.of(given.payload, monkeypatch)
    assert await refused(server(max_intermediates=7), given) == "certificate_untrusted"
    assert costs.signatures == MAX_SIGNATURES + 1  # the last one is refused


async def test_an_operator_may_allow_less(server) -> None:
    node = ROOT.node(key=rsa_key(3072))
    assert await refused(server(max_rsa_key_size=2048), evidence(node)) == "certificate_key_size"


# ---- mode spiffe


def svid(authority: Certified, path: str, trust_domain: str = "example.org", **more: Any) -> Certified:
    return authority.node(uris=[f"spiffe://{trust_domain}{path}"], **more)


OWN = root("example.org", uris=["spiffe://example.org"])


async def test_an_svid_is_exchanged(agent, server) -> None:
    found = await attested(agent(svid(OWN, "/spire-exchange/rack/7")), server(OWN, mode="spiffe"))
    assert (found.path, found.reattestable) == ("/x509pop/rack/7", True)
    assert Selector(f"x509pop:ca:fingerprint:{sha1(OWN)}") in found.selectors


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (lambda: svid(OWN, "/other/7"), "certificate_prefix"),
        (lambda: svid(OWN, "/spire-exchange"), "certificate_prefix"),
        (lambda: svid(OWN, "/spire-exchanges/7"), "certificate_prefix"),
        (lambda: svid(OWN, "/spire/agent/x509pop/7"), "certificate_prefix"),
        (lambda: svid(ROOT, "/spire-exchange/7"), "certificate_untrusted"),
        (lambda: svid(OWN, "/spire-exchange/7", "other.org"), "certificate_no_bundle"),
        (lambda: OWN.node(uris=["spiffe://example.org/spire-exchange/7", "spiffe://example.org/spire-exchange/8"]), "certificate_uri_count"),
        (OWN.node, "certificate_uri_count"),
        (lambda: svid(OWN, "/spire-exchange/7", life=-10), "certificate_expired"),
    ],
)  # fmt: skip
async def test_svids_that_are_not_for_exchange(server, given, code) -> None:
    assert await refused(server(OWN, mode="spiffe"), evidence(given())) == code


async def test_the_bundle_of_the_moment_counts(agent) -> None:
    bundle = [Bundle(TD)]
    judge = X509PopServer(X509PopServerSettings(mode="spiffe", svid_prefix="/nodes/"))
    judge.settle(Home(TD, lambda: bundle[0]))
    node = svid(OWN, "/nodes/a")
    assert await refused(judge, evidence(node)) == "certificate_untrusted"
    bundle[0] = Bundle(TD, (OWN.certificate,))
    assert (await attested(agent(node), judge)).path == "/x509pop/a"


# ---- names and selectors


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("/x509pop/cn/{{ .Subject.CommonName }}", "/x509pop/cn/node-7"),
        ("{{.PluginName}}/{{.TrustDomain}}/{{.SerialNumberHex}}", "/x509pop/example.org/0abc"),
        ("{{ .PluginName }}/{{ .URISanSelectors.rack }}-{{ .SerialNumberHex }}", "/x509pop/r1-0abc"),
    ],
)
async def test_the_operator_names_the_agents(agent, server, template, path) -> None:
    node = ROOT.node("node-7", uris=["x509pop://example.org/rack/r1"], serial=0xABC)
    assert (await attested(agent(node), server(agent_path_template=template))).path == path


@pytest.mark.parametrize("common", [(), ("a/b",), ("..",), ("a", "b"), ("n ode",), ("n\u00f6de",)])
async def test_a_name_that_is_no_segment_names_nobody(server, common) -> None:
    node = ROOT.node(*common) if common else Certified(None, ROOT.node("x").certificate)
    template = "x509pop/{{ .Subject.CommonName }}" if common else "x509pop/{{ .URISanSelectors.rack }}"
    assert await refused(server(agent_path_template=template), evidence(node)) == "agent_path"


async def test_two_values_of_one_key_are_two_selectors_and_no_name(agent, server) -> None:
    node = ROOT.node(uris=["x509pop://example.org/rack/a", "x509pop://example.org/rack/b"])
    found = await attested(agent(node), server())
    assert {Selector("x509pop:san:rack:a"), Selector("x509pop:san:rack:b")} < found.selectors
    template = "x509pop/{{ .URISanSelectors.rack }}"
    assert await refused(server(agent_path_template=template), evidence(node)) == "agent_path"


async def test_names_that_give_no_selector(agent, server) -> None:
    node = ROOT.node(
        "one", "two",
        uris=["x509pop://other.org/a/b", "x509pop://example.org/alone", "x509pop://example.org/a:b/c", "x509pop://example.org/a/b?c",
              "x509pop://example.org/a/b%0a", "x509pop://example.org/a/%ff", "https://x509pop://example.org/a/b", "x509pop://example.orgs/a/b"],
    )  # fmt: skip
    kinds = {one.value.split(":")[0] for one in (await attested(agent(node), server())).selectors}
    assert kinds == {"ca", "serialnumber"}


async def test_names_are_counted(server) -> None:
    node = ROOT.node(uris=[f"x509pop://example.org/k/{number}" for number in range(65)])
    assert await refused(server(), evidence(node)) == "certificate_names"
