"""``broker agent`` as an operator uses it: a real server and its node agents, each a process of its own."""

import json
from collections.abc import Iterator

import pytest

from tests.fakes.programs import Programs, programs, wait_for

pytestmark = pytest.mark.timeout(240)
NOBODY = "spiffe://example.org/spire/agent/x509pop/nobody"


@pytest.fixture(scope="module")
def estate() -> Iterator[Programs]:
    """``token`` joined by a token, ``cert`` and ``gone`` by certificates; ``gone`` stopped and its SVID ran out."""
    with programs() as made:
        made.start_server(agent_ttl="20s")
        made.start_agent("token")
        for name in ("gone", "cert"):
            made.start_agent(name, certified=True)
            if name == "gone":
                made.stop("gone")
        yield made


def ids(estate: Programs, *filters: str) -> list[str]:
    found = estate.json("agent", "list", *filters)
    assert found["kind"] == "agents"
    return [one["spiffe_id"] for one in found["items"]]


def of(estate: Programs, name: str) -> str:
    """The agent's ID: by the selector that its certificate gives, or by how it joined."""
    if name == "token":
        return ids(estate, "-attestationType", "join_token")[0]
    return ids(estate, "-selector", f"x509pop:subject:cn:{name}")[0]


def test_each_filter_narrows(estate: Programs) -> None:
    everybody = ids(estate)
    token, cert, gone = (of(estate, name) for name in ("token", "cert", "gone"))
    assert sorted(everybody) == sorted([token, cert, gone])
    assert ids(estate, "--attestation-type", "join_token") == [token]
    assert sorted(ids(estate, "--can-reattest", "true")) == sorted([cert, gone])
    assert ids(estate, "-canReattest=false") == [token]
    assert ids(estate, "--banned", "true") == []
    assert sorted(ids(estate, "-banned=false")) == sorted(everybody)
    both = ("--selector", "x509pop:subject:cn:cert", "--selector", "x509pop:subject:cn:gone")
    assert ids(estate, *both) == []
    assert sorted(ids(estate, *both, "--match-selectors", "any")) == sorted([cert, gone])
    assert ids(estate, *both, "-matchSelectorsOn", "exact") == []
    assert ids(estate, "--expires-before", "2001-01-01T00:00:00Z") == []
    assert ids(estate, "-expiresBefore", "2001-01-01 00:00:00 +0000 +00") == []
    assert sorted(ids(estate, "--expires-before", "2999-01-01T00:00:00+01:00")) == sorted(everybody)
    assert estate.json("agent", "count") == {"kind": "agent_count", "count": 3}
    assert estate.json("agent", "count", "-canReattest=true", "--selector", "x509pop:subject:cn:cert")["count"] == 1


def test_show_and_every_format(estate: Programs) -> None:
    cert = of(estate, "cert")
    shown = estate.json("agent", "show", cert)
    assert (shown["kind"], shown["attestation_type"], shown["can_reattest"], shown["banned"]) == (
        "agent", "x509pop", True, False,
    )  # fmt: skip
    assert shown["x509_svid_expires_at"].endswith("Z")
    assert "x509pop:subject:cn:cert" in shown["selectors"]
    assert estate.json("agent", "show", "-spiffeID", cert)["spiffe_id"] == cert
    ended = estate.run("agent", "show", cert)
    assert "x509pop:subject:cn:cert" in ended.stdout
    assert f"next: broker entry list --parent-id {cert}" in ended.stderr
    assert f"agent/{cert}\n" in estate.run("agent", "list", "-o", "name").stdout
    assert "SELECTORS" in estate.run("agent", "list", "-o", "wide").stdout
    assert "SELECTORS" not in estate.run("agent", "list").stdout
    assert "kind: agents" in estate.run("agent", "list", "-o", "yaml").stdout
    lines = estate.run("agent", "list", "-o", "jsonl").stdout.splitlines()
    assert {json.loads(line)["kind"] for line in lines} == {"agent"}
    assert estate.run("agent", "count", "-q").stdout == f"{len(lines)}\n"


def test_what_is_not_there_and_what_is_no_id(estate: Programs) -> None:
    assert estate.error("agent", "show", NOBODY, code=3)["code"] == "agent_not_found"
    assert estate.error("agent", "ban", NOBODY, "--yes", code=3)["code"] == "agent_not_found"
    assert estate.error("agent", "evict", NOBODY, "--yes", code=3)["code"] == "agent_not_found"
    estate.error("agent", "show", "spiffe://example.org/workload", code=2)
    estate.error("agent", "list", "--expires-before", "soon", code=2)
    estate.error("agent", "evict", NOBODY, "--no-input", code=2)


def test_evicting_lets_it_come_back(estate: Programs) -> None:
    cert = of(estate, "cert")
    before = estate.json("agent", "show", cert)["x509_svid_serial_number"]
    dry = estate.run("agent", "evict", cert, "--dry-run")
    assert "nothing was sent" in dry.stderr
    assert estate.json("agent", "show", cert)["x509_svid_serial_number"] == before
    ended = estate.run("agent", "evict", cert, "--yes")
    assert f"evicted {cert}" in ended.stderr
    assert "next: " in ended.stderr
    # Its certificate proves the node again, and nobody has to do anything.
    again = wait_for(lambda: [one for one in estate.json("agent", "list")["items"] if one["spiffe_id"] == cert])
    assert again[0]["x509_svid_serial_number"] != before
    wait_for(lambda: estate.agent_answers("cert"))


def test_a_banned_agent_stays_out_until_it_is_evicted(estate: Programs) -> None:
    estate.start_agent("bad", certified=True)
    bad = of(estate, "bad")
    assert "banned" in estate.run("agent", "ban", bad, "--yes").stderr
    assert ids(estate, "--banned", "true") == [bad]
    assert estate.json("agent", "show", bad)["banned"]
    # It has nothing left to serve with, also after a start with the certificate that let it in.
    wait_for(lambda: not (estate.directory / "bad/private/identity.json").exists(), "the end of its identity")
    estate.stop("bad")
    text = (estate.directory / "bad.toml").read_text()
    estate.start("bad", text, noun="agent")
    wait_for(lambda: "banned" in (estate.directory / "bad.log").read_text(), "its refusal")
    assert estate.json("agent", "show", bad)["banned"]
    estate.stop("bad")
    # A purge forgets no ban: the node could come back.
    assert bad not in [one["spiffe_id"] for one in purged(estate, "--dry-run")]
    estate.run("agent", "evict", bad, "--yes")
    assert bad not in ids(estate)


def purged(estate: Programs, *more: str) -> list[dict[str, object]]:
    found = estate.json("agent", "purge", "--expired-for", "1s", *more)
    assert found["kind"] == "purged_agents"
    return list(found["items"])


def test_what_expired_long_ago_is_purged(estate: Programs) -> None:
    gone, token = of(estate, "gone"), of(estate, "token")
    wait_for(lambda: gone in [one["spiffe_id"] for one in purged(estate, "--dry-run")], "the end of its SVID")
    assert gone in ids(estate)
    assert estate.json("agent", "purge", "--yes")["items"] == []  # expired for a day: nobody
    assert estate.json("agent", "purge", "-expiredFor", "1s", "-dryRun")["items"]
    assert gone in ids(estate)
    estate.error("agent", "purge", "--expired-for", "1s", "--no-input", code=2)
    rows = {one["spiffe_id"]: one for one in purged(estate, "--yes")}
    assert rows[gone]["deleted"] is True
    assert rows[gone]["error"] is None
    # A join token is good once: who came by one could not come back.
    assert token not in rows
    assert gone not in ids(estate)
    assert token in ids(estate)
