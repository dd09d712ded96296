"""Join tokens, both halves."""

import pytest

from attestors.node.join_token import JoinTokenAgent, JoinTokenServer, JoinTokenServerSettings, JoinTokenSettings
from broker.attestation.contract import AttestorFailed, Evidence
from broker.errors import Refused


def agent(**settings) -> JoinTokenAgent:
    return JoinTokenAgent(JoinTokenSettings(**settings))


async def challenge(text: bytes) -> bytes:
    raise AssertionError("a join token is never challenged")


server = JoinTokenServer(JoinTokenServerSettings())


async def test_the_token_is_the_payload() -> None:
    evidence = await agent(join_token="abc-123").evidence()
    assert (evidence.type, evidence.payload) == ("join_token", b"abc-123")


async def test_the_file_is_read_at_each_attempt(tmp_path) -> None:
    path = tmp_path / "token"
    path.write_text("first\n")
    attestor = agent(join_token_file=path)
    assert (await attestor.evidence()).payload == b"first"
    path.write_text("second")
    assert (await attestor.evidence()).payload == b"second"


@pytest.mark.parametrize("text", ["", "a b", "two\nlines", "..", "a/b", "\u212a", "x" * 257])
async def test_what_is_no_token_is_never_sent_nor_accepted(tmp_path, text) -> None:
    path = tmp_path / "token"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(AttestorFailed) as refused:
        await agent(join_token_file=path).evidence()
    assert not text.strip() or text not in str(refused.value)
    with pytest.raises(Refused) as unknown:
        await server.verify(Evidence("join_token", text.encode()), challenge)
    assert unknown.value.reason == "join_token_unknown"


async def test_without_a_token_it_says_what_to_do(tmp_path) -> None:
    for attestor in (agent(), agent(join_token_file=tmp_path / "missing")):
        with pytest.raises(AttestorFailed):
            await attestor.evidence()
    with pytest.raises(AttestorFailed):
        await agent(join_token="x").respond(b"prove it")


async def test_the_server_names_the_node_after_its_token_and_uses_it_up() -> None:
    node = await server.verify(Evidence("join_token", b"abc-123"), challenge)
    assert (node.path, node.consumes, node.reattestable, node.selectors) == (
        "/join_token/abc-123",
        "abc-123",
        False,
        frozenset(),
    )


@pytest.mark.bears("I11")
@pytest.mark.parametrize("payload", [b"abc\x00def", b"abc\n", "abc\u0130".encode(), b"\xff"])
async def test_a_payload_is_taken_whole_or_not_at_all(payload) -> None:
    with pytest.raises(Refused):
        await server.verify(Evidence("join_token", payload), challenge)


def test_the_token_is_not_shown() -> None:
    assert "abc-123" not in repr(JoinTokenSettings(join_token="abc-123"))
