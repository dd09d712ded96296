"""OpenID discovery for JWT-SVIDs: one set of keys for them, another one for task tokens, and neither in the other."""

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from broker.server.api.http.app import create_app
from broker.server.api.http.discovery import Discovery
from broker.spiffe import Bundle, BundleSet, TrustDomain, verify_x509_svid
from broker.tasks.keyset import read_keys
from tests.unit.server.api.http.door import HttpDoorway, assert_error, payload_of
from tests.unit.server.tasks.estate import AGENT, ISSUER
from tests.unit.transport.pki import Authority

DOMAIN = TrustDomain("example.org")
KEYS = {"b": ec.generate_private_key(ec.SECP256R1()), "a": rsa.generate_private_key(65537, 2048)}
BUNDLE = Bundle(DOMAIN, (), {kid: key.public_key() for kid, key in KEYS.items()})


def client(issuer: str = ISSUER, bundle: Bundle = BUNDLE, services=None) -> httpx2.AsyncClient:
    app = create_app(services, Discovery(issuer, lambda: bundle))
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="https://broker.example.org")


@pytest.mark.parametrize("issuer", [ISSUER, "https://broker.example.org/one/two"])
async def test_the_document_names_the_issuer_and_leads_to_the_keys(issuer: str) -> None:
    async with client(issuer) as http:
        document = (await http.get(f"{issuer}/.well-known/openid-configuration")).json()
        assert document == {
            "issuer": issuer,
            "jwks_uri": f"{issuer}/oidc/keys",
            "authorization_endpoint": "",
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256", "RS256"],
        }
        answer = await http.get(document["jwks_uri"])
        assert answer.headers["content-type"] == "application/jwk-set+json"
        assert [(one["kid"], one["use"], one["alg"]) for one in answer.json()["keys"]] == [
            ("a", "sig", "RS256"),
            ("b", "sig", "ES256"),
        ]


async def test_an_independent_reader_verifies_a_jwt_svid_by_discovery() -> None:
    claims = {"sub": "spiffe://example.org/app", "aud": ["sts"], "iss": ISSUER, "exp": 4102444800}
    svid = jwt.encode(claims, KEYS["b"], "ES256", {"kid": "b"})
    async with client() as http:
        document = (await http.get("/.well-known/openid-configuration")).json()
        keys = jwt.PyJWKSet.from_dict((await http.get(document["jwks_uri"])).json())
    key = next(one for one in keys.keys if one.key_id == "b")
    assert jwt.decode(svid, key, ["ES256"], audience="sts", issuer=ISSUER)["sub"] == "spiffe://example.org/app"


async def test_nothing_is_promised_without_keys() -> None:
    async with client(bundle=Bundle(DOMAIN)) as http:
        assert (await http.get("/oidc/keys")).json() == {"keys": []}


@pytest.mark.bears("X07")
async def test_task_tokens_and_jwt_svids_are_never_of_one_set(door: HttpDoorway) -> None:
    """A reader that does not look at typ must not take one for the other: their keys are not in the same place."""
    token = (await door.token()).json()["access_token"]
    kid = jwt.get_unverified_header(token)["kid"]
    assert payload_of(token)["iss"] == ISSUER
    task_keys = read_keys((await door.client.get("/keys")).text)
    assert kid in task_keys
    async with client() as http:
        oidc = (await http.get("/oidc/keys")).json()["keys"]
        assert (await http.get("/keys")).status_code == 404
    assert {one["kid"] for one in oidc}.isdisjoint(task_keys)
    metadata = (await door.client.get("/.well-known/oauth-authorization-server")).json()
    assert metadata["jwks_uri"] == f"{ISSUER}/keys"


async def test_a_foreign_svid_is_no_client_of_the_task_endpoints(door: HttpDoorway) -> None:
    foreign = Authority("other.test")
    identity = foreign.issue("spiffe://other.test/app")
    door.come_as(verify_x509_svid(list(identity.chain_der), BundleSet.of(foreign.bundle), now=door.estate.clock.now()))
    assert_error(await door.token(), 401, "invalid_client")
    for path in ("/introspect", "/revoke"):
        assert_error(await door.post(path, [("token", "x")]), 401, "invalid_client")
    for path in ("/keys", "/.well-known/oauth-authorization-server"):
        assert (await door.client.get(path)).status_code == 200
    door.come_as(AGENT)
    assert (await door.post("/introspect", [("token", "x")])).json() == {"active": False}
