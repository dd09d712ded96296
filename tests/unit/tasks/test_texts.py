import pytest

from broker.errors import Invalid
from broker.tasks import Cause
from broker.tasks.texts import check_digest, check_id, check_issuer, check_name, check_purpose
from tests.unit.tasks.world import HASH


def test_what_is_meant_passes() -> None:
    check_id("tsk_01JB-7Z", "id")
    check_name("auth0|user 7@x", "user")
    check_issuer("https://idp.example.org/realm", "issuer")
    check_digest(HASH, "hash")
    check_purpose("Triage ticket №4711 für Anna")


@pytest.mark.parametrize("text", ["", "a b", "a\n", "a/b", "é", "x" * 129, "a\x00"])
def test_an_id_is_of_our_own_making(text: str) -> None:
    with pytest.raises(Invalid):
        check_id(text, "id")


@pytest.mark.bears("JW18", "AC07")
@pytest.mark.parametrize("text", ["", " a", "a ", "a\n", "é", "\u212a", "x" * 256, "a\x7f"])
def test_a_name_is_ascii_and_compared_byte_by_byte(text: str) -> None:
    with pytest.raises(Invalid):
        check_name(text, "user")


@pytest.mark.parametrize(
    "text", ["", "https://", "http://a", "HTTPS://a", "https://a b", "https://a\n", "https://" + "a" * 2048]
)
def test_an_issuer_is_an_https_url(text: str) -> None:
    with pytest.raises(Invalid):
        check_issuer(text, "issuer")


@pytest.mark.parametrize(
    "text", ["", "A" * 43, "sha-256:" + "A" * 42, "sha-256:" + "A" * 44, "sha-256:" + "A" * 42 + "B", HASH + "\n"]
)
def test_a_hash_has_one_form(text: str) -> None:
    with pytest.raises(Invalid):
        check_digest(text, "hash")


@pytest.mark.parametrize("text", ["", "   ", "a\nb", "a\x00", "x" * 1025, "\ud800"])
def test_a_purpose_is_a_sentence(text: str) -> None:
    with pytest.raises(Invalid):
        check_purpose(text)


def test_causes_are_words_for_a_log() -> None:
    assert len({cause.value for cause in Cause}) == len(Cause)
    assert all(cause.value == cause.name.lower() for cause in Cause)
