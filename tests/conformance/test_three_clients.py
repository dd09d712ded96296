"""SPIFFE_Workload_API.md once more, as three clients see it: by hand, by our SDK, by an independent library."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from cryptography import x509

from broker.clock import SystemClock
from broker.spiffe import Bundle, BundleSet, verify_jwt_svid, verify_x509_svid
from broker.spiffe.jose import parse_compact
from tests.conformance.clients import CLIENTS, Client, Refused
from tests.conformance.house import DOMAIN, ONE, SECONDS, TWO, House, program_environment

THREE = f"spiffe://{DOMAIN}/conformance/three"


@pytest.fixture(params=CLIENTS)
def client(house: House, request: pytest.FixtureRequest) -> Iterator[Client]:
    house.x509()
    with closing(CLIENTS[request.param](str(house.agent_socket))) as one:
        yield one


def names(client: Client) -> list[str]:
    try:
        return [name for name, _ in client.svids()]
    except Refused:
        return []


def accepted(client: Client, token: str, audience: str) -> bool:
    try:
        client.validate(token, audience)
    except Refused:
        return False
    return True


def becomes(client: Client, *wanted: str) -> None:
    deadline = time.monotonic() + SECONDS
    while names(client) != list(wanted):
        assert time.monotonic() < deadline, names(client)
        client.jwt("tests")  # a turn of the SDK's loop


@pytest.mark.bears("WA-01", "WA-06", "WA-12", "WA-16", "WA-25", "X5-01", "X5-03", "X5-17", "ID-21", "WE-02")
def test_x509_svids(client: Client) -> None:
    told, trusted = client.svids(), client.authorities()
    assert [name for name, _ in told] == [ONE, TWO]
    assert set(trusted) == {DOMAIN.name}
    bundle = Bundle(DOMAIN, tuple(x509.load_der_x509_certificate(der) for der in sorted(trusted[DOMAIN.name])))
    for name, leaf in told:
        svid = verify_x509_svid([leaf], BundleSet.of(bundle), now=SystemClock().now())
        assert str(svid.id) == name


@pytest.mark.bears("WA-01", "WA-17", "WA-18", "JW-01", "JW-06", "JW-07", "JW-08")
def test_jwt_svids(house: House, client: Client) -> None:
    assert client.jwt("tests")[0] == ONE
    name, token = client.jwt("tests", TWO)
    assert name == TWO
    svid = verify_jwt_svid(token, house.bundles, audience="tests", now=SystemClock().now())
    assert (str(svid.id), set(svid.audience)) == (TWO, {"tests"})
    with pytest.raises(Refused):
        client.jwt("tests", THREE)
    with pytest.raises(Refused):
        client.jwt("tests", "spiffe://foreign.test/x")


@pytest.mark.bears("WA-09")
def test_what_must_be_given(house: House, client: Client) -> None:
    with pytest.raises(Refused):
        client.jwt("")
    token = house.replica.token()
    for text, audience in ((token, ""), ("", "tests")):
        with pytest.raises(Refused):
            client.validate(text, audience)
    assert client.validate(token, "tests")[0] == ONE


@pytest.mark.bears("WA-10", "WA-11", "WA-20", "WA-21", "WA-22", "JW-03", "JW-05")
def test_validation(house: House, client: Client) -> None:
    token = client.jwt("tests")[1]
    subject, claims = client.validate(token, "tests")
    assert subject == ONE
    payload = parse_compact(token).payload
    assert {name: claims[name] for name in ("sub", "exp")} == {name: payload[name] for name in ("sub", "exp")}
    bad = {
        "another audience": (token, "other"),
        "a damaged signature": (token[:-4] + "AAAA", "tests"),
        "no token": ("x", "tests"),
        "another trust domain": (house.replica.token(sub="spiffe://foreign.test/x"), "tests"),
        "another type": (house.replica.token({"typ": "at+jwt"}), "tests"),
        "over": (house.replica.token(exp=1), "tests"),
        "no expiry": (house.replica.token(exp=None), "tests"),
        "an unknown key": (house.replica.token({"kid": "nobody's"}), "tests"),
    }
    assert [name for name, asked in bad.items() if accepted(client, *asked)] == []


@pytest.mark.bears("WA-04", "WA-05", "WA-08", "WA-15")
def test_what_comes_and_what_goes(house: House, client: Client) -> None:
    assert names(client) == [ONE, TWO]
    # Its id decides where it stands if it is made in the second in which the others were.
    with house.registered("/conformance/three", id="conformance-3"):
        becomes(client, ONE, TWO, THREE)
        assert client.jwt("tests", THREE)[0] == THREE
    becomes(client, ONE, TWO)
    with pytest.raises(Refused):
        client.jwt("tests", THREE)


@pytest.mark.bears("WA-14", "WE-09")
def test_who_is_not_entitled(house: House) -> None:
    run = subprocess.run(
        [house.stranger, "-m", "tests.conformance.clients", house.agent_socket],
        env=program_environment(os.environ), capture_output=True, check=True, timeout=4 * SECONDS,
    )  # fmt: skip
    told = json.loads(run.stdout)
    assert set(told) == set(CLIENTS)
    assert all(words for answers in told.values() for words in answers.values()), told
    assert set(told["gRPC"].values()) == {"PERMISSION_DENIED: no identity issued"}
    assert set(told["SDK"].values()) == {"no_identity_issued"}
    assert all("no identity issued" in words for words in told["py-spiffe"].values())
