"""The settings of federation: what they name, what they refuse, and the bundles to begin with."""

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from broker.errors import Misconfigured
from broker.server import settings as module
from broker.server.federation_settings import bootstrap, configured_relationships
from broker.server.settings import ServerSettings
from broker.spiffe import SpiffeId, TrustDomain
from broker.spiffe.federation import Profile, Relationship
from tests.unit.server.identity.test_bundles import published
from tests.unit.server.identity.world import world
from tests.unit.transport.pki import Authority

OTHER = TrustDomain("other.test")
CA = Authority("other.test")
TOML = """
[server]
trust_domain = "example.org"
[server.federation.bundle_endpoint]
address = "127.0.0.1"
port = 9443
refresh_hint = "10m"
profile = "https_spiffe"
[[server.federation.federates_with]]
trust_domain = "other.test"
bundle_endpoint_url = "https://other.test:8443"
bundle_endpoint_profile = "https_spiffe"
endpoint_spiffe_id = "spiffe://other.test/spire/server"
[[server.federation.federates_with]]
trust_domain = "web.test"
bundle_endpoint_url = "https://web.test"
bundle_endpoint_profile = "https_web"
"""


def federating(**changes):
    return ServerSettings(
        federation={
            "federates_with": [
                {
                    "trust_domain": "other.test",
                    "bundle_endpoint_url": "https://other.test/",
                    "bundle_endpoint_profile": "https_spiffe",
                    "endpoint_spiffe_id": "spiffe://other.test/spire/server",
                    **changes,
                }
            ]
        }
    )


def test_a_file_says_it_in_spires_words(tmp_path):
    (tmp_path / "server.toml").write_text(TOML)
    read = module.load(tmp_path / "server.toml", {})
    assert read.federation.bundle_endpoint.port == 9443
    assert read.federation.bundle_endpoint.refresh_hint.total_seconds() == 600
    assert configured_relationships(read) == (
        Relationship(
            OTHER, "https://other.test:8443", Profile.HTTPS_SPIFFE, SpiffeId("spiffe://other.test/spire/server")
        ),
        Relationship(TrustDomain("web.test"), "https://web.test", Profile.HTTPS_WEB),
    )


def test_without_the_table_nothing_is_opened_and_nobody_asked():
    assert ServerSettings().federation.bundle_endpoint is None
    assert configured_relationships(ServerSettings()) == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"trust_domain": "example.org"},
        {"bundle_endpoint_url": "http://other.test/"},
        {"endpoint_spiffe_id": None},
        {"bundle_endpoint_profile": "https_web"},
    ],
)
def test_what_cannot_be_is_refused_at_the_start(changes):
    with pytest.raises(Misconfigured) as refused:
        configured_relationships(federating(**changes))
    assert refused.value.reason == "federation_settings"


def test_one_trust_domain_once():
    one = federating().federation.federates_with[0]
    with pytest.raises(Misconfigured, match="twice"):
        configured_relationships(ServerSettings(federation={"federates_with": [one, one]}))


@pytest.mark.bears("FE-15")
@pytest.mark.parametrize("form", ["pem", "spiffe"])
async def test_a_bundle_to_begin_with_is_stored_once(tmp_path, form):
    path = tmp_path / "other.bundle"
    text = CA.certificate.public_bytes(Encoding.PEM) if form == "pem" else CA.bundle.to_json().encode()
    path.write_bytes(text)
    settings = federating(trust_domain_bundle_path=path)
    (tmp_path / "db").mkdir()
    async with world(tmp_path / "db") as here:
        await bootstrap(settings, here.store, here.clock)
        assert here.federated.trusted[OTHER].x509_authorities == (CA.certificate,)
        newer = published(sequence=9)
        await here.bundles.set([newer], "op")
        await bootstrap(settings, here.store, here.clock)
        assert here.bundles.federated(OTHER) == newer


@pytest.mark.parametrize("content", [None, b"", b"{", b"no bundle"])
async def test_a_bundle_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "other.bundle"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Misconfigured, match="trust_domain_bundle_path"):
        await bootstrap(federating(trust_domain_bundle_path=path), None, None)
