"""Workloads of another trust domain, such as a plain SPIRE's: judged under its own bundle, and let in by name only."""

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker._proto.spire.api.types import bundle_pb2
from broker.client import Bundles, dial_socket
from broker.clock import SystemClock
from broker.keys import Signer
from broker.keys.local import generated
from broker.server.task_settings import WitIssuerSettings
from broker.spiffe import TrustDomain, jose
from broker.transport.tls import TlsIdentity, client_context, roots_of
from tests.attacks.tasks.binding_rig import LOOSE, TOKEN_URL, Desk, Prover, desk, eventually, short_directory
from tests.attacks.tasks.listening import listening
from tests.attacks.tasks.test_binding_clients import claims
from tests.fakes.oidc import OidcIssuer
from tests.integration.test_token_endpoint import ISSUER, TICKETS
from tests.unit.tasks import test_wit as wits
from tests.unit.transport.pki import Authority

BOT = "spiffe://partner.example/agents/bot"
NAMED = ("spiffe://partner.example/agents/*", "spiffe://partner.example/one")


@dataclass
class Partner:
    """The other trust domain, whose bundle the desk's server was given, and its workloads' way to the desk."""

    at: Desk
    authority: Authority
    jwt: Signer

    async def client(self, identity: TlsIdentity) -> httpx2.AsyncClient:
        context = client_context(identity, roots_of(self.at.node.trusted))
        base = f"https://127.0.0.1:{self.at.one.port}"
        return await self.at.stack.enter_async_context(
            httpx2.AsyncClient(verify=context, base_url=base, trust_env=False)
        )

    def jwt_svid(self, sub: str, kid: str = "partner-1", aud: object = None) -> str:
        at = int(SystemClock().now().timestamp())
        payload = {"sub": sub, "aud": aud or [ISSUER], "exp": at + 60, "iat": at}
        return jose.sign_compact({"alg": "ES256", "kid": kid, "typ": "JWT"}, payload, self.jwt.sign)


@asynccontextmanager
async def partnership(directory: Path, oidc: OidcIssuer, **tasks) -> AsyncIterator[Partner]:
    async with desk(directory, oidc, **tasks) as at:
        authority, jwt = Authority("partner.example"), generated("partner-1")
        public = jwt.public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        message = bundle_pb2.Bundle(trust_domain="partner.example")
        message.x509_authorities.add(asn1=authority.certificate.public_bytes(Encoding.DER))
        message.jwt_authorities.add(public_key=public, key_id="partner-1")
        channel = dial_socket(at.one.socket_path)
        try:
            await Bundles(channel).set_federated(message)
        finally:
            await channel.close()
        yield Partner(at, authority, jwt)


@pytest.fixture
async def partner(oidc: OidcIssuer) -> AsyncIterator[Partner]:
    with short_directory() as directory:
        async with partnership(directory, oidc, foreign_starters=NAMED) as made:
            yield made


@pytest.mark.bears("SP11", "X03", "SP03")
async def test_only_whom_the_settings_name(partner: Partner) -> None:
    at = partner.at
    for named in (BOT, "spiffe://partner.example/one", "spiffe://partner.example/agents/deep/er"):
        client = await partner.client(partner.authority.issue(named))
        issued = await client.post("/token", data=at.form())
        assert issued.status_code == 200, issued.text
        said = claims(issued.json()["access_token"])
        assert (said["client_id"], said["act"]) == (named, {"sub": named})
        task = issued.json()["task"]
        assert (await client.get(f"/tasks/{task}")).json()["agent"] == named
        asked = {"token": issued.json()["access_token"]}
        assert (await client.post("/introspect", data=asked)).json()["active"] is True
        assert (await client.post(f"/tasks/{task}/complete")).json()["state"] == "completed"
        assert (await client.post("/introspect", data=asked)).json() == {"active": False}
    for stranger in (
        "spiffe://partner.example/agents",
        "spiffe://partner.example/agents-evil",
        "spiffe://partner.example/agents-evil/x",
        "spiffe://partner.example/one/two",
        "spiffe://partner.example/onemore",
        "spiffe://partner.example/spire/agent/x",
    ):
        client = await partner.client(partner.authority.issue(stranger))
        answer = await client.post("/token", data=at.form())
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client"), stranger
    assert len(await at.refusals("invalid_client")) == 6


@pytest.mark.bears("SP11", "X05")
async def test_nobody_is_named_until_somebody_is(oidc: OidcIssuer) -> None:
    with short_directory() as directory:
        async with partnership(directory, oidc) as partner:
            client = await partner.client(partner.authority.issue(BOT))
            answer = await client.post("/token", data=partner.at.form())
            assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
            nobody = await partner.at.nobody()
            answer = await Prover().post(nobody, partner.at.asserted(partner.jwt_svid(BOT)))
            assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")


@pytest.mark.bears("SP03", "SP05", "PB15", "JW05")
async def test_each_trust_domain_signs_for_itself_alone(partner: Partner) -> None:
    at, nobody = partner.at, await partner.at.nobody()
    forged = partner.authority.issue("spiffe://example.org/triage")
    twice = partner.authority.issue(BOT, "spiffe://example.org/triage")
    above = partner.authority.issue(BOT, is_ca=True)
    other = Authority("partner.example").issue(BOT)
    for identity in (forged, twice, above, other):
        client = await partner.client(identity)
        try:
            answer = await client.post("/token", data=at.form())
        except httpx2.HTTPError:
            continue  # refused in the handshake
        assert (answer.status_code, "access_token" in answer.json()) == (403, False)

    async def are_on_record() -> bool:
        reasons = {one.fields["reason"] for one in at.records("connection_refused")}
        return reasons >= {"svid_untrusted", "svid_uri_count"}

    await eventually(are_on_record)
    issued = await Prover().post(nobody, at.asserted(partner.jwt_svid(BOT)))
    assert issued.status_code == 200, issued.text
    for assertion in (
        partner.jwt_svid("spiffe://example.org/triage"),
        partner.jwt_svid("spiffe://third.example/agents/bot"),
        partner.jwt_svid(BOT, kid="partner-2"),
        partner.jwt_svid(BOT, aud=[ISSUER, ISSUER]),
        partner.jwt_svid(BOT, aud=[ISSUER, "x"]),
        partner.jwt_svid(BOT, aud={"x": ISSUER}),
    ):
        answer = await Prover().post(nobody, at.asserted(assertion))
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
        assert "access_token" not in answer.json()
    single = await Prover().post(nobody, at.asserted(partner.jwt_svid(BOT, aud=ISSUER)))
    assert single.status_code == 200
    assert len(await at.refusals("invalid_client")) == 6


@pytest.mark.bears("SP01")
async def test_what_is_no_spiffe_id_is_nobody(partner: Partner) -> None:
    nobody = await partner.at.nobody()
    base = "spiffe://partner.example/agents"
    for sub in (
        "spiffe://PARTNER.example/agents/bot",
        f"{base}/../agents/bot",
        f"{base}/./bot",
        f"{base}//bot",
        f"{base}/bot/",
        f"{base}/%62ot",
        f"{base}/bot%2e",
        "spiffe://partner.example:443/agents/bot",
        "spiffe://user@partner.example/agents/bot",
        f"{base}/bot?x=1",
        f"{base}/bot#x",
        f"{base}/b\u043et",
        f"{base}/{'x' * 2048}",
        f" {base}/bot",
        f"{base}/bot\n",
        "https://partner.example/agents/bot",
        "",
    ):
        answer = await Prover().post(nobody, partner.at.asserted(partner.jwt_svid(sub)))
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client"), sub
    assert len(await partner.at.refusals("invalid_client")) == 17


@pytest.mark.bears("X05")
async def test_a_trust_domain_that_is_let_go_has_no_workloads_here(partner: Partner) -> None:
    """Exchange, re-exchange, renewal, introspection, and a verifier on the feed: of its tokens none is left."""
    at, client = partner.at, await partner.client(partner.authority.issue(BOT))
    issued = (await client.post("/token", data=at.form())).json()
    token, task = issued["access_token"], issued["task"]
    own = await at.process("ws_1")
    mine = (await own.http.post("/token", data=at.form())).json()["access_token"]
    renewal = at.form(task=task)
    del renewal["purpose"]
    again = at.form(subject_token=token)
    del again["purpose"]
    for asked in (renewal, again):
        assert (await client.post("/token", data=asked)).status_code == 200
    async with listening(at.channel) as ear:
        assert (ear.says(token), ear.says(mine)) == ("alive", "alive")
        channel = dial_socket(at.one.socket_path)
        try:
            await Bundles(channel).delete_federated("partner.example")
        finally:
            await channel.close()
        assert await ear.refuses(token) == "task_ended"
        assert ear.says(mine) == "alive"
    # A bystander that may introspect for the service is told nothing of it any more.
    assert (await own.http.post("/introspect", data={"token": token})).json() == {"active": False}
    assert (await own.http.post("/introspect", data={"token": mine})).json()["active"] is True

    for asked in (at.form(), renewal, again, {"token": token}):

        async def is_over(body: dict[str, str] = asked) -> bool:
            try:
                answer = await client.post("/introspect" if "token" in body else "/token", data=body)
            except httpx2.HTTPError:
                return True  # its certificate is nobody's: the connection is closed
            return answer.status_code != 200 or answer.json() == {"active": False}

        await eventually(is_over)
    answer = await Prover().post(await at.nobody(), at.asserted(partner.jwt_svid(BOT)))
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
    (deleted,) = at.records("bundle_deleted")
    ended = at.records("task_ended")
    assert {(one.subject, one.fields["cause"]) for one in ended} == {(task, "authority_tainted")}
    assert {one.actor for one in ended} == {deleted.actor}


async def test_a_window_is_for_those_of_whom_no_session_is_told(partner: Partner) -> None:
    client = await partner.client(partner.authority.issue(BOT))
    loose = claims((await client.post("/token", data=partner.at.form(LOOSE))).json()["access_token"])
    assert loose["cnf"]["bind"] == "window"
    strict = claims((await client.post("/token", data=partner.at.form(TICKETS))).json()["access_token"])
    assert set(strict["cnf"]) == {"x5t#S256"}
    own = await partner.at.process("ws_1")
    told = claims((await own.http.post("/token", data=partner.at.form(LOOSE))).json()["access_token"])
    assert set(told["cnf"]) == {"x5t#S256"}


@pytest.mark.bears("PB16", "X06")
async def test_a_workload_identity_token_with_its_proof(oidc: OidcIssuer, tmp_path: Path) -> None:
    keys = tmp_path / "wit.json"
    jwk = {**jose.jwk_from_public_key(wits.SIGNER.public["wit-1"]), "kid": "wit-1", "use": "wit-svid"}
    keys.write_text(json.dumps({"keys": [jwk]}))
    issuer = WitIssuerSettings(trust_domain=TrustDomain("example.org"), keys_path=keys)
    with short_directory() as directory:
        async with desk(directory, oidc, wit_issuers=(issuer,)) as at:
            nobody = await at.nobody()
            metadata = (await nobody.get("/.well-known/oauth-authorization-server")).json()
            assert "spiffe_wit" in metadata["token_endpoint_auth_methods_supported"]
            now = int(SystemClock().now().timestamp())
            wit = wits.wit(sub="spiffe://example.org/triage", exp=now + 60)

            def shown(**changes) -> dict[str, str]:
                proof = wits.wpt(
                    wit, **({"exp": now + 30, "jti": secrets.token_urlsafe(8), "aud": TOKEN_URL} | changes)
                )
                return {"Workload-Identity-Token": wit, "Workload-Proof-Token": proof}

            good = shown()
            issued = await nobody.post("/token", data=at.form(), headers=good)
            assert issued.status_code == 200, issued.text
            assert claims(issued.json()["access_token"])["cnf"] == {"jkt": wits.HOLDER.jkt}
            assert issued.json()["token_type"] == "DPoP"
            again = await nobody.post("/token", data=at.form(), headers=good)
            assert "access_token" not in again.json()
            assert await at.refusals("proof_replayed")
            for wrong in (
                shown(alg="ES384"),
                shown(wth="x"),
                shown(oth={"x-other": "x"}),
                shown(ath="x"),
                shown(tth="x"),
                shown(aud="https://evil.example/token"),
                {"Workload-Identity-Token": wit},
                {"Workload-Proof-Token": good["Workload-Proof-Token"]},
            ):
                answer = await nobody.post("/token", data=at.form(), headers=wrong)
                assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
            both = await nobody.post("/token", data=at.form(), headers=shown(jti="b") | Prover().header())
            assert both.json()["error"] == "invalid_request"
            assert len(await at.refusals("invalid_wpt")) == 6
