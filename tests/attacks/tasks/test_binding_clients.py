"""Who authenticates at the token endpoint, and what a replayed or borrowed proof is worth: nothing, and it is on record."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.sdk.dpop import ProofKey
from broker.spiffe.jose import b64url_decode, b64url_encode, parse_compact
from broker.tasks import Confirmation
from tests.attacks.tasks.binding_rig import (
    KEYED,
    LOOSE,
    TOKEN_URL,
    Desk,
    Prover,
    desk,
    eventually,
    short_directory,
)
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import Estate, own_bundle, running
from tests.integration.test_token_endpoint import ISSUER, TICKETS, TRIAGE

ROUNDS = 8
"""Proofs that two replicas are asked about at the same time; BINDING_ROUNDS in the environment asks more often."""


@pytest.fixture
async def at(oidc: OidcIssuer) -> AsyncIterator[Desk]:
    with short_directory() as directory:
        async with desk(directory, oidc, allow_bearer=True) as opened:
            yield opened


def claims(token: str) -> dict:
    return dict(parse_compact(token).payload)


@pytest.mark.bears("SP07", "PB04", "X03")
async def test_a_jwt_svid_comes_with_a_proof_or_not_at_all(at: Desk) -> None:
    nobody, prover, svid = await at.nobody(), Prover(), await at.jwt_svid()
    bare = await nobody.post("/token", data=at.asserted(svid))
    assert (bare.status_code, bare.json()["error"]) == (401, "invalid_client")
    (record,) = await at.refusals("dpop_missing")
    assert record.actor == "anonymous"

    issued = await prover.post(nobody, at.asserted(svid, client_id=str(TRIAGE)))
    assert issued.status_code == 200, issued.text
    assert issued.headers["cache-control"] == "no-store"
    body = issued.json()
    assert body["token_type"] == "DPoP"
    said = claims(body["access_token"])
    assert said["cnf"] == {"jkt": prover.key.jkt}
    assert said["client_id"] == said["act"]["sub"] == str(TRIAGE)
    (record,) = at.records("token_issued")
    assert (record.fields["binding"], record.fields["jkt"], record.fields["x5t"]) == ("dpop", prover.key.jkt, None)

    # Whoever saw the JWT-SVID on its way makes a key of his own, and gets nothing.
    thief = await Prover().post(nobody, at.asserted(svid))
    assert (thief.status_code, thief.json()["error"]) == (401, "invalid_client")
    assert (await at.refusals("assertion_replayed"))[0].actor == str(TRIAGE)
    assert (await prover.post(nobody, at.asserted(svid))).status_code == 200


@pytest.mark.bears("X03", "PB01")
async def test_a_token_that_is_bound_to_a_key_is_brought_with_a_proof_of_it(at: Desk) -> None:
    """As the subject of an exchange, too: another process of its own workload has the token, and not the key."""
    nobody, prover, svid = await at.nobody(), Prover(), await at.jwt_svid()
    held = (await prover.post(nobody, at.asserted(svid))).json()["access_token"]
    mine = {"subject_token": held, "subject_token_type": "urn:ietf:params:oauth:token-type:access_token"}
    asserted, bare = at.asserted(svid, **mine), at.form(**mine)
    for form in (asserted, bare):
        del form["purpose"]
    again = await prover.post(nobody, asserted)
    assert again.status_code == 200, again.text
    process = await at.process("ws_1")
    for answer in (await process.http.post("/token", data=bare), await Prover().post(process.http, bare)):
        assert (answer.status_code, answer.json()["error"]) == (400, "unauthorized_client")
    assert [record.actor for record in await at.refusals("subject_not_held")] == [str(TRIAGE)] * 2
    again = await prover.post(process.http, bare)
    assert again.status_code == 200, again.text


@pytest.mark.bears("SP06")
async def test_an_assertion_is_for_this_issuer_alone(at: Desk) -> None:
    nobody, prover = await at.nobody(), Prover()
    for audience in (
        [TOKEN_URL],
        [ISSUER, "https://other.example"],
        ["https://other.example", ISSUER],
        [ISSUER + "/"],
        ["https://other.example"],
    ):
        answer = await prover.post(nobody, at.asserted(await at.jwt_svid(*audience)))
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client"), audience
        assert "access_token" not in answer.json()
    assert len(await at.refusals("invalid_client")) == 5


@pytest.mark.bears("X01", "PB02", "SP05")
async def test_a_client_comes_in_one_way(at: Desk) -> None:
    agent, nobody, prover = await at.process("ws_1"), await at.nobody(), Prover()
    svid = await at.jwt_svid()
    both = await agent.http.post("/token", data=at.asserted(svid))
    assert (both.status_code, both.json()["error"]) == (400, "invalid_request")
    assert (await at.refusals("two_authentications"))[0].actor == str(TRIAGE)
    for wit in ({"Workload-Identity-Token": "a.b.c"}, {"Workload-Proof-Token": "a.b.c"}):
        assert (await agent.http.post("/token", data=at.form(), headers=wit)).json()["error"] == "invalid_request"
        assert (await nobody.post("/token", data=at.asserted(svid), headers=wit)).json()["error"] == "invalid_request"
        off = await nobody.post("/token", data=at.form(), headers=wit)
        assert (off.status_code, off.json()["error"]) == (401, "invalid_client")
    basic = await nobody.post("/token", data=at.form(), headers={"Authorization": "Basic eDp5"})
    assert (basic.status_code, basic.json()["error"]) == (401, "invalid_client")
    for changes in (
        {"client_id": "spiffe://example.org/other"},
        {"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"},
    ):
        answer = await prover.post(nobody, at.asserted(svid) | changes)
        assert answer.status_code in (400, 401)
        assert "access_token" not in answer.json()
    half = {k: v for k, v in at.asserted(svid).items() if k != "client_assertion_type"}
    assert (await prover.post(nobody, half)).json()["error"] == "invalid_client"


@pytest.mark.bears("PB04", "PB05", "PB06", "PB09", "JW14")
async def test_a_proof_is_shown_once(at: Desk) -> None:
    agent, prover = await at.process("ws_1"), Prover()
    wanted = await agent.http.post("/token", data=at.form(), headers=prover.header())
    assert (wanted.status_code, wanted.json()["error"]) == (400, "use_dpop_nonce")
    prover.nonce = wanted.headers["dpop-nonce"]
    assert not at.records("token_refused"), "a nonce that is asked for is no refusal"

    used = prover.header()
    assert (await agent.http.post("/token", data=at.form(), headers=used)).status_code == 200
    again = await agent.http.post("/token", data=at.form(), headers=used)
    assert (again.status_code, again.json()["error"]) == (400, "invalid_dpop_proof")
    assert (await at.refusals("proof_replayed"))[0].actor == str(TRIAGE)

    # The other text of the same ECDSA signature is no other proof.
    head, body, signature = used["DPoP"].split(".")
    raw = b64url_decode(signature)
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    twin = raw[:32] + (order - int.from_bytes(raw[32:])).to_bytes(32)
    twisted = {"DPoP": f"{head}.{body}.{b64url_encode(twin)}"}
    assert (await agent.http.post("/token", data=at.form(), headers=twisted)).json()["error"] == "invalid_dpop_proof"

    # A proof that a refused request brought is used up as well.
    burnt = prover.header()
    assert (
        await agent.http.post("/token", data=at.form(resource="https://x.example"), headers=burnt)
    ).status_code == 400
    assert (await agent.http.post("/token", data=at.form(), headers=burnt)).json()["error"] == "invalid_dpop_proof"

    for url in ("https://evil.example/token", f"https://127.0.0.1:{at.one.port}/token", f"{ISSUER}/introspect"):
        other = Prover(url)
        other.key, other.nonce = prover.key, prover.nonce
        assert (await other.post(agent.http, at.form())).json()["error"] == "invalid_dpop_proof"
    long = ProofKey()
    huge = {"DPoP": long.proof("POST", TOKEN_URL, nonce="x" * 10_000)}
    assert (await agent.http.post("/token", data=at.form(), headers=huge)).json()["error"] == "invalid_dpop_proof"
    two = [("DPoP", prover.header()["DPoP"]), ("DPoP", prover.header()["DPoP"])]
    assert (await agent.http.post("/token", data=at.form(), headers=two)).json()["error"] == "invalid_dpop_proof"


@pytest.mark.bears("PB08")
async def test_no_header_says_what_the_address_is(at: Desk) -> None:
    agent = await at.process("ws_1")
    spoofed = {"X-Forwarded-Host": "evil.example", "Host": "evil.example", "X-Forwarded-Proto": "https"}
    evil = Prover("https://evil.example/token")
    assert (await evil.post(agent.http, at.form(), **spoofed)).json()["error"] == "invalid_dpop_proof"
    good = Prover()
    assert (await good.post(agent.http, at.form(), **spoofed)).status_code == 200


@pytest.mark.bears("PB04", "X06")
async def test_a_restart_forgets_no_proof(oidc: OidcIssuer) -> None:
    with short_directory() as directory:
        async with desk(directory, oidc) as at:
            prover, agent = Prover(), await at.process("ws_1")
            assert (await prover.post(agent.http, at.form())).status_code == 200
            used = prover.header()
            assert (await agent.http.post("/token", data=at.form(), headers=used)).status_code == 200
        async with desk(directory, oidc) as again:
            agent = await again.process("ws_2")
            answer = await agent.http.post("/token", data=again.form(), headers=used)
            assert (answer.status_code, answer.json()["error"]) == (400, "invalid_dpop_proof")
            assert await again.refusals("proof_replayed")
            # The nonce outlived the restart, too: nobody has to ask again.
            assert (await agent.http.post("/token", data=again.form(), headers=prover.header())).status_code == 200


@pytest.mark.bears("X06", "PB04")
async def test_two_replicas_take_a_proof_once(oidc: OidcIssuer, postgresql: str) -> None:
    import os  # noqa: PLC0415

    rounds = int(os.environ.get("BINDING_ROUNDS", ROUNDS))
    with short_directory() as directory, short_directory() as second:
        async with desk(directory, oidc, store=postgresql) as at:
            settings = {"issuer": ISSUER, "subjects": at.one.settings.subjects, "audiences": at.one.settings.audiences}
            async with running(Estate(second, postgresql), **settings) as two:
                at.node.trusted = await own_bundle(two)
                nobody = [await at.nobody(at.one), await at.nobody(two)]
                prover = Prover()
                svid = await at.jwt_svid()

                async def both_know() -> bool:
                    answers = [await prover.post(one, at.asserted(svid)) for one in nobody]
                    return all(answer.status_code == 200 for answer in answers)

                await eventually(both_know)
                for _ in range(rounds):
                    data, header = at.asserted(svid), prover.header()
                    gate = asyncio.Barrier(2)

                    async def ask(client, data=data, header=header, gate=gate) -> int:
                        await gate.wait()
                        answer = await client.post("/token", data=data, headers=header)
                        return int(answer.status_code)

                    assert sorted(await asyncio.gather(*(ask(one) for one in nobody))) == [200, 400]
                # The JWT-SVID is one key's: of two keys at two replicas at once, one.
                for _ in range(rounds):
                    fresh, provers = await at.jwt_svid(), (Prover(), Prover())
                    for one in provers:
                        one.nonce = prover.nonce
                    answers = await asyncio.gather(
                        *(p.post(c, at.asserted(fresh)) for p, c in zip(provers, nobody, strict=True))
                    )
                    assert sorted(answer.status_code for answer in answers) == [200, 401]


@pytest.mark.bears("PB02")
async def test_a_token_that_is_bound_to_nobody_takes_three_consents(oidc: OidcIssuer, at: Desk) -> None:
    agent = await at.process("ws_1")
    asked = at.form(LOOSE, token_binding="bearer")
    loose = await agent.http.post("/token", data=asked)
    assert loose.status_code == 200, loose.text
    said = claims(loose.json()["access_token"])
    assert "cnf" not in said
    assert said["exp"] - said["iat"] <= 60
    assert at.records("token_issued")[-1].fields["binding"] == "bearer"
    unasked = claims((await agent.http.post("/token", data=at.form(LOOSE))).json()["access_token"])
    assert unasked["cnf"]["x5t#S256"] == agent.svid.x5t
    elsewhere = await agent.http.post("/token", data=at.form(TICKETS, token_binding="bearer"))
    assert (elsewhere.status_code, elsewhere.json()["error"]) == (400, "invalid_target")
    assert await at.refusals("bearer_not_allowed")
    assert (await agent.http.post("/token", data=at.form(LOOSE, token_binding="x"))).json()[
        "error"
    ] == "invalid_request"
    with short_directory() as directory:
        async with desk(directory, oidc) as strict:
            agent = await strict.process("ws_1")
            answer = await agent.http.post("/token", data=strict.form(LOOSE, token_binding="bearer"))
            assert answer.json()["error"] == "invalid_target"


@pytest.mark.bears("X03")
async def test_an_audience_says_what_its_tokens_are_bound_to(at: Desk) -> None:
    agent, nobody, prover = await at.process("ws_1"), await at.nobody(), Prover()
    keyed = await prover.post(agent.http, at.form(KEYED))
    said = claims(keyed.json()["access_token"])
    assert Confirmation.parse(said["cnf"]) == Confirmation(session="ws_1", jkt=prover.key.jkt)
    without = await agent.http.post("/token", data=at.form(KEYED))
    assert (without.status_code, without.json()["error"]) == (400, "invalid_target")
    assert await at.refusals("dpop_required")
    refused = await prover.post(nobody, at.asserted(await at.jwt_svid(), LOOSE))
    assert (refused.status_code, refused.json()["error"]) == (400, "invalid_target")
    assert await at.refusals("dpop_not_accepted")


@pytest.mark.bears("PB14")
async def test_a_forwarded_certificate_of_a_stranger_is_not_read(at: Desk, tmp_path: Path) -> None:
    from urllib.parse import quote  # noqa: PLC0415

    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    agent, nobody = await at.process("ws_1"), await at.nobody()
    pem = quote("".join(one.public_bytes(Encoding.PEM).decode() for one in agent.svid.chain))
    for header in (
        {"X-Forwarded-Client-Cert": f'Hash=x;Cert="{pem}";Chain="{pem}";URI={TRIAGE}'},
        {"X-Client-Cert": pem, "X-SSL-Client-Verify": "SUCCESS"},
        {"Client-Cert": f":{pem}:"},
    ):
        answer = await nobody.post("/token", data=at.form(), headers=header)
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
    assert len(await at.refusals("invalid_client")) == 3


@pytest.mark.bears("PB14")
async def test_a_pinned_proxy_speaks_of_the_client_behind_it(oidc: OidcIssuer) -> None:
    from urllib.parse import quote  # noqa: PLC0415

    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    from broker.spiffe import SpiffeId  # noqa: PLC0415
    from tests.integration.test_token_endpoint import register  # noqa: PLC0415

    gateway = SpiffeId("spiffe://example.org/gateway")
    with short_directory() as directory:
        async with desk(directory, oidc, trusted_proxies=(gateway,)) as at:
            proxy = await at.process("ws_gw", await register(at.one, at.agent_id, gateway))
            agent = await at.process("ws_1")
            pem = quote("".join(one.public_bytes(Encoding.PEM).decode() for one in agent.svid.chain))
            good = {"X-Forwarded-Client-Cert": f'Hash=x;Cert="{pem}";Chain="{pem}"'}
            issued = await proxy.http.post("/token", data=at.form(), headers=good)
            assert issued.status_code == 200, issued.text
            assert claims(issued.json()["access_token"])["cnf"]["x5t#S256"] == agent.svid.x5t
            bare = await proxy.http.post("/token", data=at.form())
            assert (bare.status_code, bare.json()["error"]) == (401, "invalid_client")
            for value in (
                good["X-Forwarded-Client-Cert"] + "," + good["X-Forwarded-Client-Cert"],
                f"URI={TRIAGE}",
                "x",
                f'Cert="{pem[:-40]}"',
                f'Cert="{pem}";Cert="{pem}x"',
            ):
                answer = await proxy.http.post("/token", data=at.form(), headers={"X-Forwarded-Client-Cert": value})
                assert answer.status_code in (400, 401), value
                assert "access_token" not in answer.json()
