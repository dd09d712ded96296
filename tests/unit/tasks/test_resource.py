import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid
from broker.tasks import Resource

SEGMENT = st.text("abAB01-._~!$&'()*+,=:@", min_size=1, max_size=4).filter(lambda text: text not in (".", ".."))
PATHS = st.lists(SEGMENT, max_size=4)


@pytest.mark.bears("TX12")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://a.example/", "https://a.example"),
        ("https://A.Example", "https://a.example"),
        ("HTTPS://a.example", "https://a.example"),
        ("https://a.example:443/x", "https://a.example/x"),
        ("https://a.example/%41%7e%2D", "https://a.example/A~-"),
        ("https://a.example/%c3%a9", "https://a.example/%C3%A9"),
        ("https://[2001:DB8:0:0::1]/x", "https://[2001:db8::1]:443/x"),
    ],
)
def test_what_is_the_same_is_equal(one: str, other: str) -> None:
    assert Resource(one) == Resource(other)
    assert hash(Resource(one)) == hash(Resource(other))
    assert Resource(one).text == other.replace(":443", "")
    assert str(Resource(one)) == Resource(one).text


@pytest.mark.bears("TX12")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://a.example/x", "https://a.example/X"),
        ("https://a.example/x", "https://a.example/x/"),
        ("https://a.example", "https://b.a.example"),
        ("https://a.example:8443", "https://a.example"),
        ("https://a.example/a", "https://a.example/ab"),
    ],
)
def test_what_differs_is_not_equal(one: str, other: str) -> None:
    assert Resource(one) != Resource(other)


@pytest.mark.bears("TX12", "TX13", "SV12")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "https://",
        "https:///x",
        "http://a.example",
        "a.example",
        "//a.example",
        "urn:x:y",
        "https:a.example",
        "https://a.example/x#f",
        "https://a.example#",
        "https://a.example/x?q=1",
        "https://a.example?",
        "https://user@a.example",
        "https://user:pw@a.example/x",
        "https://a.example/../b",
        "https://a.example/a/..",
        "https://a.example/./b",
        "https://a.example/%2e%2E/b",
        "https://a.example/.%2e/b",
        "https://a.example/..;x/b",
        "https://a.example/a%2Fb",
        "https://a.example/a%2fb",
        "https://a.example/a%5Cb",
        "https://a.example/a\\b",
        "https://a.example/a%00",
        "https://a.example/a%0a",
        "https://a.example/a%7f",
        "https://a.example/a%252Fb",
        "https://a.example/a%3Fb",
        "https://a.example/a%23b",
        "https://a.example/%c0%af",
        "https://a.example/%ff",
        "https://a.example/%c3x%a9",
        "https://a.example/%4",
        "https://a.example/%zz",
        "https://a.example//b",
        "https://a.example/b//",
        "https://a.example/a b",
        "https://a.example/a\n",
        "https://a.example\n",
        "https://a.example/é",
        "https://é.example",
        "https://\u212a.example",
        "https://a.example:0/",
        "https://a.example:0443/",
        "https://a.example:65536/",
        "https://a.example:/",
        "https://a.example:x/",
        "https://a..example",
        "https://.a.example",
        "https://a.example.",
        "https://-a.example",
        "https://" + "a" * 64 + ".example",
        "https://" + "a." * 126 + "example",
        "https://a%2eexample",
        "https://[::1",
        "https://[fe80::1%25eth0]/",
        "https://[1.2.3.4]/",
        "https://[:::]/",
        "https://a.example/" + "x" * 2048,
        " https://a.example",
    ],
)
def test_what_two_readers_could_read_differently_is_refused(text: str) -> None:
    with pytest.raises(Invalid) as refused:
        Resource(text)
    assert refused.value.reason == "invalid_target"


@pytest.mark.parametrize("value", [None, 1, b"https://a.example", ["https://a.example"]])
def test_only_text_is_a_resource(value: object) -> None:
    with pytest.raises(Invalid):
        Resource(value)  # type: ignore[arg-type]


@pytest.mark.bears("BG06", "SP11")
@pytest.mark.parametrize(
    ("outer", "inner", "holds"),
    [
        ("https://x/a", "https://x/a", True),
        ("https://x/a", "https://x/a/b", True),
        ("https://x/a", "https://x/a/", True),
        ("https://x/a/", "https://x/a/b", True),
        ("https://x", "https://x/a", True),
        ("https://x/", "https://x/a", True),
        ("https://x/a", "https://x/ab", False),
        ("https://x/a/", "https://x/a", False),
        ("https://x/a/b", "https://x/a", False),
        ("https://x", "https://x.evil/a", False),
        ("https://x", "https://x:8443/a", False),
        ("https://x/a", "https://y/a/b", False),
        ("https://x/A", "https://x/a/b", False),
    ],
)
def test_containment_ends_at_a_segment(outer: str, inner: str, *, holds: bool) -> None:
    assert Resource(outer).contains(Resource(inner)) is holds


@given(PATHS, PATHS)
def test_containment_is_the_order_of_paths(one: list[str], other: list[str]) -> None:
    outer = Resource("https://a.example/" + "/".join(one))
    inner = Resource("https://a.example/" + "/".join(other))
    assert outer.contains(inner) is (other[: len(one)] == one)


@given(st.text(max_size=40) | st.from_regex(r"(?i)https://[a-z0-9.:\[\]%/;?#@\\-]{0,40}", fullmatch=True))
def test_the_normal_form_is_its_own_normal_form(text: str) -> None:
    try:
        resource = Resource(text)
    except Invalid:
        return
    assert Resource(resource.text) == resource
    assert Resource(resource.text).text == resource.text
    assert resource.text.startswith("https://")
    authority, _, path = resource.text[len("https://") :].partition("/")
    assert not set(authority) & set("#?@\\; \n%")
    assert not set(path) & set("#?\\; \n")  # an @ in a path is a letter like any other (RFC 3986, section 3.3)
