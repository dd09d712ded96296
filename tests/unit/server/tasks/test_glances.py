"""What a token says of itself is looked at once, and believed by nobody."""

import json

import pytest

from broker.server.tasks import delegated
from broker.server.tasks.delegated import Glance, Glances
from broker.spiffe import jose
from broker.spiffe.jose import b64url_encode

OURS = "https://broker.test"


def token(header: dict[str, object] | None = None, **payload: object) -> str:
    parts = [{"alg": "ES256", **(header or {})}, payload]
    return ".".join([*(b64url_encode(json.dumps(part).encode()) for part in parts), "AA"])


@pytest.mark.parametrize(
    ("text", "is_own", "names_actor"),
    [
        (token(iss=OURS), True, False),
        (token(iss=OURS, may_act={"sub": "x"}), True, True),
        (token(iss="https://idp.test"), False, False),
        (token(iss="https://idp.test", may_act=None), False, True),
        (token({"x5t": "x"}, iss="https://idp.test", may_act=1), False, True),
        # A header that ours never have.
        (token({"x5t": "x"}, iss=OURS), False, False),
        (token(iss=[OURS]), False, False),
        (token({"alg": "none"}, iss=OURS, may_act=1), False, False),
        ("", False, False),
        ("dlg_1", False, False),
        ("a.b.c", False, False),
        ("\ud800.é.\x00", False, False),
    ],
)
def test_it_is_what_it_says(text: str, is_own: bool, names_actor: bool) -> None:
    glances = Glances(OURS)
    assert [glances.at(text), glances.at(text)] == [Glance(is_own=is_own, names_actor=names_actor)] * 2


def test_each_is_looked_at_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    parse = jose.parse_compact

    def counted(text: str, *, allowed_headers: frozenset[str]) -> jose.UnverifiedJws:
        looked.append(text)
        return parse(text, allowed_headers=allowed_headers)

    monkeypatch.setattr(jose, "parse_compact", counted)
    monkeypatch.setattr(delegated, "TOKENS_KEPT", 2)
    glances = Glances(OURS)
    one, other, third = (token(iss=OURS, n=number) for number in range(3))
    for text in (one, other, one, other, third, one):
        glances.at(text)
    assert looked == [one, other, third, one]
