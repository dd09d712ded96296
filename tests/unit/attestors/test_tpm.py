"""Attestation by a TPM, both halves, with real keys and certificates; the TPM is one in software."""

import asyncio
import base64
import datetime as dt
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from attestors.node import tpm as module
from attestors.node.tpm import TpmAgent, TpmServer, TpmServerSettings, TpmSettings
from broker.attestation import certificate_files
from broker.attestation.base64_json import MAX_MESSAGE
from broker.attestation.contract import AttestedNode, AttestorFailed, Evidence
from broker.errors import NotAttested, Unavailable
from broker.spiffe import Selector
from tests.fakes.costs import Costs
from tests.fakes.node_pki import Certified, ec_key, root, rsa_key
from tests.fakes.software_tpm import GOOD, SoftwareTpm, ak_area, sized
from tests.unit.attestors.tpm_maker import ECC_KEY, EK, ISSUER, KEY, MAKER, ek_certificate
from tests.unit.server.authority.world import StandingClock

VECTORS = json.loads((Path(__file__).parents[1] / "attestation" / "tpm_vectors.json").read_text())


def tpm(key=KEY, **more: Any) -> SoftwareTpm:
    return SoftwareTpm(key, ek_certificate(key, **more).der)


def agent(one: SoftwareTpm, **settings: Any) -> TpmAgent:
    return TpmAgent(TpmSettings(**settings), one)


def text(octets: bytes) -> str:
    return base64.b64encode(octets).decode()


def evidence(**content: bytes) -> Evidence:
    return Evidence("tpm", json.dumps({name: text(value) for name, value in content.items()}).encode())


def of(one: SoftwareTpm, **instead: bytes) -> Evidence:
    ek = {"ek_public": one.public} if one.certificate is None else {"ek_certificate": one.certificate}
    return evidence(**(ek | {"ak_public": sized(one.ak)} | instead))


@pytest.fixture
def server(tmp_path):
    """Make a server's half of these authorities and these listed hashes."""

    def make(*authorities: Certified, listed: tuple[str, ...] | None = None, clock=None, **more: Any) -> TpmServer:
        if authorities or listed is None:
            more["ca_path"] = tmp_path / "cas"
            more["ca_path"].mkdir()
            for number, one in enumerate(authorities or (MAKER, ISSUER)):
                (more["ca_path"] / f"{number}.pem").write_bytes(one.pem)
        if listed is not None:
            more["hash_path"] = tmp_path / "hashes"
            more["hash_path"].mkdir()
            for name in listed:
                (more["hash_path"] / name).touch()
        return TpmServer(TpmServerSettings(**more), clock)

    return make


async def attested(judge: TpmServer, one: SoftwareTpm, **settings: Any) -> AttestedNode:
    node = agent(one, **settings)
    return await judge.verify(await node.evidence(), node.respond)


async def never(challenge: bytes) -> bytes:
    raise AssertionError("a TPM that does not count is never challenged")


async def refused(judge: TpmServer, given: Evidence, respond=never) -> str:
    with pytest.raises(NotAttested) as why:
        await judge.verify(given, respond)
    return why.value.reason


# ---- who comes in

KEYS = {
    "RSA-2048": KEY,
    "RSA-3072": rsa_key(3072),
    "P-256": ECC_KEY,
    "P-384": ec_key(ec.SECP384R1),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
async def test_a_certified_tpm_proves_itself(server, key) -> None:
    one = tpm(key)
    found = await attested(server(), one)
    assert (found.path, found.reattestable, found.consumes) == (f"/tpm/{one.pub_hash}", True, None)
    assert found.selectors == {
        Selector(f"tpm:pub_hash:{one.pub_hash}"),
        Selector(f"tpm:ca_hash:{hashlib.sha256(ISSUER.der).hexdigest()}"),
        Selector("tpm:issuer:cn:TPM Maker Issuing 3"),
    }


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
async def test_a_listed_tpm_needs_no_certificate(server, key) -> None:
    one = SoftwareTpm(key)
    found = await attested(server(listed=(one.pub_hash,)), one)
    assert found.path == f"/tpm/{one.pub_hash}"
    assert found.selectors == {Selector(f"tpm:pub_hash:{one.pub_hash}")}


async def test_it_attests_again_and_is_the_same(server) -> None:
    judge, node = server(), agent(tpm())
    paths = {(await judge.verify(await node.evidence(), node.respond)).path for _ in range(3)}
    assert len(paths) == 1


async def test_the_list_counts_at_that_moment(server, tmp_path) -> None:
    one = SoftwareTpm(KEY)
    judge = server(listed=())
    assert await refused(judge, of(one)) == "ek_not_listed"
    (tmp_path / "hashes" / one.pub_hash).touch()
    await attested(judge, one)
    (tmp_path / "hashes" / one.pub_hash).unlink()
    assert await refused(judge, of(one)) == "ek_not_listed"


async def test_a_list_that_cannot_be_read_refuses(server, tmp_path) -> None:
    one = SoftwareTpm(KEY)
    judge = server(listed=(one.pub_hash,))
    (tmp_path / "hashes").rename(tmp_path / "away")
    assert await refused(judge, of(one)) == "ek_not_listed"
    judge._settings = judge._settings.model_copy(update={"hash_path": tmp_path / ("y" * 300)})
    with pytest.raises(Unavailable):
        await judge.verify(of(one), never)


async def test_either_or_both(server, tmp_path) -> None:
    certified, bare = tpm(), SoftwareTpm(ECC_KEY)
    either = server(ISSUER, listed=(bare.pub_hash,))
    await attested(either, certified)
    await attested(either, bare)
    both = TpmServer(TpmServerSettings(**either._settings.model_dump() | {"accept": "both"}))
    assert await refused(both, of(certified)) == "ek_not_listed"
    assert await refused(both, of(bare)) == "ek_certificate_missing"
    (tmp_path / "hashes" / certified.pub_hash).touch()
    assert len((await attested(both, certified)).selectors) == 3


async def test_a_listed_tpm_with_a_certificate_that_does_not_count_has_no_authority(server) -> None:
    one = tpm(issuer=root("Stranger"))
    found = await attested(server(ISSUER, listed=(one.pub_hash,)), one)
    assert found.selectors == {Selector(f"tpm:pub_hash:{one.pub_hash}")}


@pytest.mark.parametrize("kind", ["rsa-2048", "ecc-p384"])
async def test_a_real_tpms_certificate(tmp_path, kind) -> None:
    (tmp_path / "ca.crt").write_bytes(base64.b64decode(VECTORS["authority"]))
    clock = StandingClock(dt.datetime(2027, 6, 1, tzinfo=dt.UTC))
    judge = TpmServer(TpmServerSettings(ca_path=tmp_path / "ca.crt"), clock)
    certificate, public = (base64.b64decode(VECTORS[kind][one]) for one in ("ek_certificate", "ek_public"))
    known = judge._judge(evidence(ek_certificate=certificate, ak_public=sized(ak_area())).payload)
    assert known.pub_hash == hashlib.sha256(public).hexdigest()
    assert Selector("tpm:issuer:cn:swtpm-localca") in module._selectors(known)
    assert await refused(judge, evidence(ek_public=public, ak_public=sized(ak_area()))) == "ek_certificate_missing"


# ---- who does not: the endorsement key


@pytest.mark.bears("I10")
@pytest.mark.parametrize(
    ("certificate", "code"),
    [
        pytest.param(lambda: ek_certificate(issuer=root("Stranger")), "untrusted", id="stranger"),
        pytest.param(lambda: ek_certificate(issuer=root("TPM Maker Root")), "untrusted", id="same name, other key"),
        pytest.param(lambda: ek_certificate(issuer=MAKER.authority("Unknown")), "untrusted", id="gap in the chain"),
        pytest.param(lambda: ek_certificate(age=7200, life=-3600), "expired", id="expired"),
        pytest.param(lambda: ek_certificate(age=-1800), "not_yet_valid", id="not yet valid"),
        pytest.param(lambda: ISSUER.authority("CA", KEY), "leaf_is_ca", id="an authority"),
        pytest.param(lambda: ek_certificate(usage="digital_signature"), "key_usage", id="signs"),
        pytest.param(
            lambda: ek_certificate(extra=(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),)),
            "extended_key_usage",
            id="of a web server",
        ),
        pytest.param(
            lambda: ek_certificate(extra=(x509.ExtendedKeyUsage([x509.ObjectIdentifier("2.23.133.8.3")]),)),
            "extended_key_usage",
            id="of an attestation key",
        ),
    ],
)
async def test_certificates_that_do_not_count(server, certificate, code) -> None:
    one = SoftwareTpm(KEY, certificate().der)
    assert await refused(server(), of(one)) == f"ek_certificate_{code}"


async def test_an_authority_that_has_expired(server) -> None:
    old = MAKER.authority("Old", age=7200, life=-3600)
    assert await refused(server(MAKER, old), of(tpm(issuer=old))) == "ek_certificate_expired"


async def test_the_refusal_tells_the_hash(server) -> None:
    one = SoftwareTpm(KEY)
    with pytest.raises(NotAttested) as why:
        await server(listed=()).verify(of(one), never)
    assert one.pub_hash in why.value.hint


@pytest.mark.bears("I12")
@pytest.mark.parametrize(
    "key",
    [
        pytest.param(lambda: rsa_key(4096), id="RSA-4096"),
        pytest.param(lambda: rsa_key(exponent=3), id="exponent 3"),
        pytest.param(lambda: ec_key(ec.SECP521R1), id="P-521"),
        pytest.param(ed25519.Ed25519PrivateKey.generate, id="Ed25519"),
    ],
)
async def test_kinds_of_endorsement_key(server, key) -> None:
    made = key()
    public = made.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    given = evidence(ek_public=public, ak_public=sized(ak_area()))
    assert await refused(server(listed=(hashlib.sha256(public).hexdigest(),)), given) == "ek_key"
    certificate = ISSUER.node("unknown", key=made, usage="key_encipherment", extra=(EK,)).der
    assert await refused(server(), evidence(ek_certificate=certificate, ak_public=sized(ak_area()))) == "ek_key"


@pytest.mark.bears("I12")
async def test_an_rsa_key_of_16384_bits_is_refused_unused(server, monkeypatch) -> None:
    public = rsa.RSAPublicNumbers(65537, (1 << 16384) - 1).public_key()
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    monkeypatch.setattr(module, "make_credential", never)
    assert await refused(server(), evidence(ek_public=der, ak_public=sized(ak_area()))) == "ek_key"


@pytest.mark.bears("I12")
async def test_a_whole_attestation_costs_little(server, monkeypatch) -> None:
    """Also where many authorities of one name have to be tried."""
    same = [root("TPM Maker", rsa_key()) for _ in range(3)]
    judge = server(*same)
    given = of(tpm(issuer=root("TPM Maker", rsa_key())))
    costs = Costs.of(given.payload, monkeypatch)
    assert await refused(judge, given) == "ek_certificate_untrusted"
    assert costs == Costs(json=1, certificates=1, signatures=len(same))


# ---- who does not: the evidence


@pytest.mark.bears("I10")
async def test_the_key_is_in_one_place_only(server) -> None:
    one = tpm()
    both = of(one, ek_public=one.public)
    assert await refused(server(), both) == "evidence_malformed"
    payload = of(one).payload
    twice = payload[:-1] + b', "ek_certificate": ' + json.dumps(text(tpm(ECC_KEY).certificate)).encode() + b"}"
    assert await refused(server(listed=()), Evidence("tpm", twice)) == "evidence_malformed"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"x"',
        b'{"ek_public": null, "ak_public": ""}',
        b'{"ek_public": "", "ak_public": ""}',
        b'{"ek_certificate": "", "ak_public": ""}',
        b'{"ek_certificate": "AAAA", "ak_public": "AAAA"}',
        b'{"ek_certificate": "AAAA"}',
        b'{"ak_public": "AAAA"}',
        b'{"EK_public": "AAAA", "ak_public": "AAAA"}',
        b'{"ek_public": ["AAAA"], "ak_public": "AAAA"}',
        b"\xff",
        b"[" * 70_000,
        b'{"ek_public": "' + b"A" * MAX_MESSAGE + b'", "ak_public": ""}',
    ],
)
async def test_malformed_evidence(server, payload) -> None:
    assert await refused(server(), Evidence("tpm", payload)) == "evidence_malformed"


async def test_sizes_and_forms(server) -> None:
    one, judge = tpm(), server()
    for spoiled in (
        of(one, ak_public=b"\0" * 1025),
        of(one, ak_public=one.ak),
        of(one, ak_public=sized(one.ak) + b"\0"),
        of(one, ek_certificate=one.certificate + b"\0"),
        of(one, ek_certificate=b"\x30" * 8193),
        of(SoftwareTpm(KEY), ek_public=one.public + b"\0"),
        of(SoftwareTpm(KEY), ek_public=one.certificate),
    ):
        assert await refused(judge, spoiled) == "evidence_malformed"


@pytest.mark.bears("I10")
async def test_a_bare_key_has_one_form(server) -> None:
    point = ECC_KEY.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    head = bytes.fromhex("3039301306072a8648ce3d020106082a8648ce3d030107032200")
    assert load_der_public_key(head + point) == ECC_KEY.public_key()
    judge = server(listed=(SoftwareTpm(ECC_KEY).pub_hash,))
    assert await refused(judge, of(SoftwareTpm(ECC_KEY), ek_public=head + point)) == "evidence_malformed"


async def test_an_attestation_key_that_is_none(server) -> None:
    one, judge = tpm(), server()
    assert await refused(judge, of(one, ak_public=sized(ak_area(attributes=GOOD & ~2)))) == "ak_attributes"
    assert await refused(judge, of(one, ak_public=sized(ak_area(kind=8)))) == "ak_algorithm"


# ---- who does not: the proof


@pytest.mark.bears("I12")
async def test_a_response_fits_one_challenge(server) -> None:
    one, judge, seen = tpm(), server(), []

    async def respond(challenge: bytes) -> bytes:
        node = agent(one)
        await node.evidence()
        seen.append((challenge, await node.respond(challenge)))
        return seen[-1][1]

    await judge.verify(of(one), respond)
    (challenge, response) = seen[0]

    async def replay(_: bytes) -> bytes:
        return response

    assert await refused(judge, of(one), replay) == "possession_not_proven"

    async def other_session(_: bytes) -> bytes:
        node = agent(one)
        await node.evidence()
        return await node.respond(challenge)

    assert await refused(judge, of(one), other_session) == "possession_not_proven"


async def test_another_tpms_certificate_is_worth_nothing(server) -> None:
    victim, thief = tpm(), tpm(rsa_key())
    sent = of(thief, ek_certificate=victim.certificate)

    async def respond(challenge: bytes) -> bytes:
        node = agent(thief)
        await node.evidence()
        return await node.respond(challenge)

    with pytest.raises((AttestorFailed, ValueError)):
        await server().verify(sent, respond)


async def test_another_attestation_key_than_the_tpms(server) -> None:
    one = tpm()
    sent = of(one, ak_public=sized(ak_area(unique=sized(b"\x33" * 32) + sized(b"\x44" * 32))))
    node = agent(one)
    await node.evidence()
    with pytest.raises(AttestorFailed) as why:
        await server().verify(sent, node.respond)
    assert why.value.reason == "tpm_failed"


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (json.dumps({"secret": text(bytes(32))}).encode(), "possession_not_proven"),
        (json.dumps({"secret": text(bytes(31))}).encode(), "possession_not_proven"),
        (json.dumps({"secret": ""}).encode(), "possession_not_proven"),
        (json.dumps({"secret": text(bytes(33))}).encode(), "evidence_malformed"),
        (b'{"secret": "", "secret": ""}', "evidence_malformed"),
        (b'{"secret": "", "more": ""}', "evidence_malformed"),
        (b"", "evidence_malformed"),
        (b" " * (MAX_MESSAGE + 1), "evidence_malformed"),
    ],
)
async def test_responses_that_prove_nothing(server, response, code) -> None:
    async def respond(_: bytes) -> bytes:
        return response

    assert await refused(server(), of(tpm()), respond) == code


# ---- the agent's half


async def test_the_agent_finds_a_certificate_in_a_file(server, tmp_path) -> None:
    certificate = ek_certificate()
    bare = SoftwareTpm(KEY)
    for name, content in (("ek.pem", certificate.pem), ("ek.crt", certificate.der)):
        (tmp_path / name).write_bytes(content)
        sent = await agent(bare, ek_certificate_path=tmp_path / name).evidence()
        assert sent.payload == of(tpm_with(bare, certificate)).payload


def tpm_with(one: SoftwareTpm, certificate: Certified) -> SoftwareTpm:
    return SoftwareTpm(one.key, certificate.der)


async def failure(node: TpmAgent) -> str:
    with pytest.raises(AttestorFailed) as why:
        await node.evidence()
    return why.value.reason


async def test_certificates_that_the_agent_does_not_send(tmp_path) -> None:
    assert await failure(agent(SoftwareTpm(KEY, ek_certificate(ECC_KEY).der))) == "ek_certificate_key"
    assert await failure(agent(SoftwareTpm(KEY, b"\x30\x03\x02\x01\x01"))) == "ek_certificate_malformed"
    assert await failure(agent(SoftwareTpm(KEY), ek_certificate_path=tmp_path / "none")) == "ek_certificate_malformed"
    (tmp_path / "two.pem").write_bytes(MAKER.pem + ISSUER.pem)
    assert (
        await failure(agent(SoftwareTpm(KEY), ek_certificate_path=tmp_path / "two.pem")) == "ek_certificate_malformed"
    )
    (tmp_path / "large").write_bytes(bytes(certificate_files.MAX_FILE + 1))
    assert await failure(agent(SoftwareTpm(KEY), ek_certificate_path=tmp_path / "large")) == "ek_certificate_malformed"


@pytest.mark.parametrize("challenge", [b"", b"{}", b'{"credential_blob": "", "encrypted_seed": "!"}'])
async def test_challenges_that_are_none(challenge) -> None:
    node = agent(tpm())
    await node.evidence()
    with pytest.raises(AttestorFailed):
        await node.respond(challenge)


async def test_the_agent_opens_one_credential_for_each_evidence(server) -> None:
    node, challenges = agent(tpm()), []

    async def respond(challenge: bytes) -> bytes:
        challenges.append(challenge)
        return await node.respond(challenge)

    with pytest.raises(AttestorFailed):
        await node.respond(b"{}")
    await server().verify(await node.evidence(), respond)
    with pytest.raises(AttestorFailed):
        await node.respond(challenges[0])


async def test_a_tpm_that_hangs_stops_nobody_else(monkeypatch) -> None:
    monkeypatch.setattr(module, "TPM_TIMEOUT", 0.2)
    go_on = threading.Event()

    class Hanging(SoftwareTpm):
        def keys(self):
            go_on.wait(30)
            return super().keys()

    ticks = 0

    async def others() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    running = asyncio.create_task(others())
    try:
        assert await failure(agent(Hanging(KEY))) == "tpm_timeout"
        assert ticks > 1
    finally:
        go_on.set()
        running.cancel()
