from datetime import timedelta
from pathlib import Path

import pytest

from broker.errors import Misconfigured
from broker.server.settings import ServerSettings, load
from broker.spiffe import SpiffeId, TrustDomain


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "server.toml"
        path.write_text(text)
        return path

    return write


def test_everything_has_a_default_that_works_and_a_description():
    settings = ServerSettings()
    assert settings.trust_domain == TrustDomain("example.org")
    assert settings.socket_path == Path("/run/broker/server/private/api.sock")
    assert settings.database_url.get_secret_value() == "sqlite:///var/lib/broker/server/broker.db"
    # Closed lists are empty, and deny.
    assert (settings.subjects, settings.audiences, settings.admin_ids) == ((), (), ())

    def check(model):
        for name, field in model.model_fields.items():
            assert field.description, name
            for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if hasattr(inner, "model_fields"):
                    check(inner)

    check(ServerSettings)


def test_a_file_is_read(file):
    settings = load(
        file(
            """
            [server]
            trust_domain = "a.example"
            roles = ["identity"]
            ca_ttl = "1h30m"
            runtime_dir = "/run/x"
            admin_ids = ["spiffe://a.example/admin"]
            [server.store]
            url = "sqlite:///srv/x.db"
            [server.tasks]
            token_ttl = "60s"
            [[server.subjects]]
            issuer = "https://idp.example/"
            audiences = ["broker"]
            [[server.audiences]]
            resource = "https://tickets.example"
            binding = ["x5t"]
            [agent]
            anything = true
            """
        ),
        {},
    )
    assert settings.trust_domain.name == "a.example"
    assert settings.roles == {"identity"}
    assert settings.ca_ttl == timedelta(minutes=90)
    assert settings.socket_path == Path("/run/x/private/api.sock")
    assert settings.database_url.get_secret_value() == "sqlite:///srv/x.db"
    assert settings.admin_ids == (SpiffeId("spiffe://a.example/admin"),)
    assert settings.tasks.token_ttl == timedelta(seconds=60)
    assert settings.subjects[0].issuer == "https://idp.example/"
    assert settings.audiences[0].binding == ("x5t",)


def test_the_environment_wins_over_the_file(file):
    variables = dict(
        BROKER_SERVER__TRUST_DOMAIN="b.example",
        BROKER_SERVER__TASKS__TOKEN_TTL="2m",
        BROKER_SERVER__AUDIENCES='[{"resource": "https://x.example"}]',
        BROKER_SERVER_SOCKET="/elsewhere.sock",
    )
    settings = load(file('[server]\ntrust_domain = "a.example"\nca_ttl = "2h"'), variables)
    assert settings.trust_domain.name == "b.example"
    assert settings.ca_ttl == timedelta(hours=2)
    assert settings.tasks.token_ttl == timedelta(minutes=2)
    assert settings.audiences[0].resource == "https://x.example"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[server]\ntrust_domian = "a"', ("server.trust_domian", "trust_domain")),
        ("[server.tasks]\ntoken_tll = '3s'", ("server.tasks.token_tll", "token_ttl")),
        ("[sever]\n", ("sever",)),
        ("trust_domain = 'a'", ("trust_domain",)),
        ("[server]\ntrust_domain = 'A'", ("server.trust_domain",)),
        ("[server]\ntrust_domain = 1", ("server.trust_domain",)),
        ("[server]\nca_ttl = 'soon'", ("server.ca_ttl",)),
        ("[server]\nca_ttl = '0s'", ("server.ca_ttl",)),
        ("[server]\nbind_port = 70000", ("server.bind_port",)),
        ("[server]\nroles = []", ("server.roles",)),
        ("[server]\nissuer = 'http://x'", ("server.issuer",)),
        ("[server.keys]\nmanager = 'paper'", ("server.keys.manager", "memory")),
        ("[server.store]\nurl = 'mysql://x'", ("server.store.url",)),
        ("[[server.audiences]]\nresource = 'https://x'\nbinding = ['paper']", ("server.audiences.0.binding",)),
        ("[server", ("TOML",)),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(file, text, words):
    with pytest.raises(Misconfigured) as caught:
        load(file(text), {})
    shown = f"{caught.value.message} {caught.value.hint}"
    assert all(word in shown for word in words), shown
    assert caught.value.hint


def test_a_value_is_not_shown(file):
    with pytest.raises(Misconfigured) as caught:
        load(file("[server.store]\nurl = 'mysql://user:secret@host/db'"), {})
    assert "secret" not in f"{caught.value.message} {caught.value.hint}"
    settings = load(file("[server.store]\nurl = 'postgresql://user:secret@host/db'"), {})
    assert settings.database_url.get_secret_value().endswith("@host/db")
    assert "secret@" not in f"{settings!r} {settings.model_dump_json()} {settings.database_url}"
