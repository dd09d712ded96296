"""A user's token that was judged before: what can change since is asked each time, the rest is not worked out twice."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from broker.errors import BrokerError, Unavailable
from broker.server.tasks import subjects as module
from broker.server.tasks.config import SubjectIssuer
from broker.server.tasks.subjects import LEEWAY, SubjectKind, Subjects
from broker.spiffe import jose
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import ManualClock


@pytest.fixture
def issuer(tmp_path: Path) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path) as running:
        yield running


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def subjects(issuer: OidcIssuer, clock: ManualClock) -> AsyncIterator[Subjects]:
    trusted = Subjects([SubjectIssuer(issuer.issuer, frozenset({"broker"}), ca_path=issuer.ca_path)], clock)
    yield trusted
    await trusted.aclose()


async def reason(subjects: Subjects, text: str, kind: SubjectKind = SubjectKind.ANY) -> str:
    with pytest.raises(BrokerError) as caught:
        await subjects.verify(text, kind)
    return caught.value.reason


async def test_a_token_is_read_and_its_signature_checked_once(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[bytes] = []
    verify = jose.verify_signature

    def counted(jws: jose.UnverifiedJws, key: jose.PublicKey, alg: str) -> None:
        checked.append(jws.signature)
        verify(jws, key, alg)

    monkeypatch.setattr(jose, "verify_signature", counted)
    text = issuer.token(now=clock.now().timestamp())
    first = await subjects.verify(text)
    assert await subjects.verify(text) is first
    assert len(checked) == 1
    # Another of the same words is another token.
    other = await subjects.verify(issuer.token(now=clock.now().timestamp(), nonce="2"))
    assert (other.user, len(checked)) == (first.user, 2)
    assert other.token_hash != first.token_hash


@pytest.mark.bears("TX19")
async def test_known_or_not_it_ends_at_its_end(issuer: OidcIssuer, clock: ManualClock, subjects: Subjects) -> None:
    text = issuer.token(now=clock.now().timestamp(), lifetime=60)
    await subjects.verify(text)
    clock.advance(60 + LEEWAY - 1)
    await subjects.verify(text)
    clock.advance(2)
    assert await reason(subjects, text) == "subject_expired"


async def test_known_or_not_it_does_not_begin_before_its_time(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects
) -> None:
    text = issuer.token(now=clock.now().timestamp())
    await subjects.verify(text)
    clock.advance(-3600)
    assert await reason(subjects, text) == "subject_not_yet"


@pytest.mark.bears("SV03")
async def test_a_key_that_the_issuer_took_back_ends_what_it_signed(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects
) -> None:
    text = issuer.token(now=clock.now().timestamp(), lifetime=7200)
    await subjects.verify(text)
    issuer.rotate()
    clock.advance(11)
    await subjects.verify(issuer.token(now=clock.now().timestamp()))  # of the new key: fetches the new set
    assert await reason(subjects, text) == "subject_key_unknown"


async def test_under_another_key_of_the_same_id_the_signature_is_checked_again(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects
) -> None:
    text = issuer.token(now=clock.now().timestamp(), lifetime=7200)
    await subjects.verify(text)
    issuer.rotate().kid = "key-1"
    clock.advance(11)
    await reason(subjects, issuer.token(now=clock.now().timestamp(), header={"kid": "another"}))  # fetches the new set
    assert await reason(subjects, text) == "token_signature"


async def test_without_the_issuers_keys_nobody_is_known(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects
) -> None:
    text = issuer.token(now=clock.now().timestamp(), lifetime=200_000)
    await subjects.verify(text)
    issuer.fault = "status"
    clock.advance(86_401)
    with pytest.raises(Unavailable):
        await subjects.verify(text)


async def test_the_kind_is_what_this_caller_says(issuer: OidcIssuer, clock: ManualClock, subjects: Subjects) -> None:
    text = issuer.token(now=clock.now().timestamp(), header={"typ": "at+jwt"})
    await subjects.verify(text, SubjectKind.ACCESS)
    assert await reason(subjects, text, SubjectKind.ID) == "token_type"


async def test_a_refused_token_is_not_known(issuer: OidcIssuer, clock: ManualClock, subjects: Subjects) -> None:
    text = issuer.token(now=clock.now().timestamp(), act={"sub": "spiffe://example.org/a"})
    for _ in range(2):
        assert await reason(subjects, text) == "subject_delegated"
    forged = issuer.token(now=clock.now().timestamp())
    await subjects.verify(forged)
    assert await reason(subjects, forged[:-4] + "AAAA") == "token_signature"


async def test_what_is_known_is_bounded(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS_KEPT", 3)
    texts = [issuer.token(now=clock.now().timestamp(), nonce=str(number)) for number in range(10)]
    for text in texts:
        await subjects.verify(text)
    assert 0 < len(subjects._known) <= 3
    assert (await subjects.verify(texts[0])).user == "alice"
