import base64
import hashlib
import json
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from broker.errors import Invalid, PolicyDenied
from broker.tasks import Authority, AuthorizationDetail, Resource
from broker.tasks.authority import MAX_BYTES, MAX_DETAILS
from tests.unit.tasks.test_constraints import CONSTRAINTS
from tests.unit.tasks.world import authority, detail

LOCATIONS = ["https://x", "https://x/a", "https://x/a/b", "https://x/ab", "https://y/a"]
ACTIONS = ["inv.*", "inv.read", "inv.pay.*", "inv.pay.big", "inv", "other"]
DETAILS = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["api", "agent_tool"]),
        "locations": st.lists(st.sampled_from(LOCATIONS), min_size=1, max_size=3),
        "actions": st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=3),
    },
    optional={
        "identifier": st.sampled_from(["1", "2"]),
        "datatypes": st.lists(st.sampled_from(["p", "q"]), min_size=1),
        "privileges": st.lists(st.sampled_from(["u", "v"]), min_size=1),
        "constraints": CONSTRAINTS.filter(bool),
    },
)


def without(members: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in members.items() if name not in names}


@st.composite
def narrower(draw: st.DrawFn, wide: Authority) -> Authority:
    """An authority that is mostly inside another: random alone would hardly ever be."""
    details = []
    for value in draw(st.lists(st.sampled_from(wide.to_json()), min_size=1, max_size=3)):
        members: dict[str, Any] = json.loads(json.dumps(value))
        if draw(st.booleans()):
            members["locations"] = [draw(st.sampled_from([*members["locations"], "https://x/a/b"]))]
        if draw(st.booleans()):
            members["actions"] = [draw(st.sampled_from([*members["actions"], "inv.pay.big"]))]
        if draw(st.booleans()):
            members |= without(draw(DETAILS), "type", "locations", "actions", "privileges")
        details.append(members)
    return Authority.parse(details)


AUTHORITIES = st.lists(DETAILS, min_size=1, max_size=3).map(Authority.parse)
RESOURCES = st.sampled_from([*LOCATIONS, "https://x/a/b/c", "https://z"]).map(Resource)


def is_part(small: Authority, large: Authority) -> bool:
    try:
        return large.narrow(small) == small
    except PolicyDenied:
        return False


def allows(
    of: Authority, action: str, place: Resource, identifier: str, tools: frozenset[str], datatypes: frozenset[str]
) -> bool:
    """What an authority means for one concrete call, written down independently of the rule under test."""
    for value in of.to_json():
        assert isinstance(value, dict)
        members: dict[str, Any] = value
        where = any(place.text == at or place.text.startswith(at + "/") for at in members["locations"])
        may = any(
            action == known or (known[-1] == "*" and action.startswith(known[:-1])) for known in members["actions"]
        )
        what = members.get("identifier", identifier) == identifier
        data = "datatypes" not in members or datatypes <= set(members["datatypes"])
        limits = members.get("constraints", {})
        with_tools = "allowed_tools" not in limits or tools <= set(limits["allowed_tools"])
        if where and may and what and data and with_tools:
            return True
    return False


def test_the_one_form_does_not_depend_on_order() -> None:
    one = authority(
        detail(actions=["b.y", "a.x", "b.y"], locations=["https://B.example/", "https://a.example"]), detail()
    )
    other = Authority.parse(
        json.dumps([detail(), detail(locations=["https://a.example:443", "https://b.example"], actions=["a.x", "b.y"])])
    )
    assert one == other
    assert hash(one) == hash(other)
    assert one.text() == other.text()
    assert one.digest == other.digest
    assert one.scope() == "a.x b.y ticket.read"
    assert [each.text for each in one.resources()] == [
        "https://a.example",
        "https://b.example",
        "https://tickets.example.org",
    ]
    assert Authority.parse(one.text()) == Authority.parse(one.to_json()) == one


def test_the_digest_is_of_the_canonical_text() -> None:
    made = authority()
    assert made.text() == ('[{"actions":["ticket.read"],"locations":["https://tickets.example.org"],"type":"api"}]')
    hashed = base64.urlsafe_b64encode(hashlib.sha256(made.text().encode()).digest()).decode().rstrip("=")
    assert made.digest == f"sha-256:{hashed}"
    assert made.digest != authority(detail(actions=["ticket.write"])).digest


@pytest.mark.bears("TX10")
@pytest.mark.parametrize(
    "value",
    [
        "",
        "[]",
        "{}",
        "null",
        "[1]",
        '[{"type":"api","type":"api"}]',
        "[NaN]",
        "\ud800",
        " " * (2 * MAX_BYTES + 1),
        [],
        {},
        None,
        7,
        [[]],
        [detail()] * (MAX_DETAILS + 1),
        [without(detail(), "type")],
        [without(detail(), "locations")],
        [without(detail(), "actions")],
        [detail(type="payment_initiation")],
        [detail(type=1)],
        [detail(extra=1)],
        [detail(locations=[])],
        [detail(locations="https://a.example")],
        [detail(locations=["http://a.example"])],
        [detail(locations=["https://a.example/../b"])],
        [detail(locations=["https://a.example#x"])],
        [detail(locations=[f"https://h{n}.example" for n in range(65)])],
        [detail(actions=[])],
        [detail(actions=["*"])],
        [detail(actions=[".*"])],
        [detail(actions=["a.*.b"])],
        [detail(actions=["a*"])],
        [detail(actions=["a."])],
        [detail(actions=["a b"])],
        [detail(actions=["a\n"])],
        [detail(actions=['a"'])],
        [detail(actions=["x" * 257])],
        [detail(identifier="")],
        [detail(identifier=None)],
        [detail(identifier=4711)],
        [detail(datatypes=[])],
        [detail(privileges=[])],
        [detail(constraints={})],
        [detail(constraints={"unknown": 1})],
        [detail(actions=[f"{n:0200}" for n in range(64)])],
    ],
)
def test_what_is_not_an_authority_is_refused(value: Any) -> None:
    with pytest.raises(Invalid) as refused:
        Authority.parse(value)
    assert refused.value.reason == "invalid_authorization_details"


def test_details_come_from_parsing_only() -> None:
    with pytest.raises(TypeError):
        AuthorizationDetail(type="api", locations=(), actions=("*",))


@pytest.mark.bears("BG06", "TX09")
@pytest.mark.parametrize(
    ("parent", "child", "within"),
    [
        (detail(), detail(), True),
        (detail(locations=["https://x/a"]), detail(locations=["https://x/a/b"]), True),
        (detail(locations=["https://x/a"]), detail(locations=["https://x/ab"]), False),
        (detail(locations=["https://x/a"]), detail(locations=["https://x"]), False),
        (detail(locations=["https://x/a"]), detail(locations=["https://x/a/b", "https://y/a"]), False),
        (detail(actions=["inv.*"]), detail(actions=["inv.read", "inv.pay.big"]), True),
        (detail(actions=["inv.*"]), detail(actions=["inv"]), False),
        (detail(actions=["inv.*"]), detail(actions=["invoice.read"]), False),
        (detail(actions=["inv.read"]), detail(actions=["inv.*"]), False),
        (detail(actions=["inv.read"]), detail(actions=["inv.read", "inv.pay"]), False),
        (detail(), detail(type="agent_tool"), False),
        (detail(identifier="1"), detail(), False),
        (detail(identifier="1"), detail(identifier="2"), False),
        (detail(), detail(identifier="1"), True),
        (detail(datatypes=["a", "b"]), detail(datatypes=["a"]), True),
        (detail(datatypes=["a"]), detail(), False),
        (detail(), detail(datatypes=["a"]), True),
        (detail(privileges=["user"]), detail(privileges=["user"]), True),
        (detail(privileges=["user"]), detail(privileges=["admin"]), False),
        (detail(privileges=["user"]), detail(), False),
        (detail(), detail(privileges=["admin"]), False),
        (detail(constraints={"tenant": "a"}), detail(), False),
        (detail(), detail(constraints={"tenant": "a"}), True),
    ],
)
def test_nothing_is_ever_added(parent: dict[str, Any], child: dict[str, Any], *, within: bool) -> None:
    wide, narrow = authority(parent), authority(child)
    if within:
        assert wide.narrow(narrow) == narrow
        return
    with pytest.raises(PolicyDenied) as refused:
        wide.narrow(narrow)
    assert refused.value.reason == "invalid_authorization_details"


def test_one_detail_too_many_refuses_all() -> None:
    with pytest.raises(PolicyDenied):
        authority().narrow(authority(detail(), detail(actions=["ticket.write"])))


def test_two_details_do_not_add_up_to_a_third() -> None:
    wide = authority(detail(identifier="1", actions=["a.x"]), detail(identifier="2", actions=["a.y"]))
    with pytest.raises(PolicyDenied):
        wide.narrow(authority(detail(identifier="1", actions=["a.y"])))


@settings(max_examples=50)
@given(st.data())
def test_narrowing_is_transitive(data: st.DataObject) -> None:
    top = data.draw(AUTHORITIES)
    middle = data.draw(narrower(top) | AUTHORITIES)
    low = data.draw(narrower(middle))
    assert is_part(top, top)
    assume(is_part(middle, top) and is_part(low, middle))
    assert is_part(low, top)


@given(
    st.data(),
    st.sampled_from(["inv", "inv.read", "inv.pay.big", "inv.pay", "other"]),
    RESOURCES,
    st.sampled_from(["1", "2"]),
    st.frozensets(st.sampled_from(["a", "b", "c"])),
    st.frozensets(st.sampled_from(["p", "q"])),
)
def test_a_part_allows_no_call_that_the_whole_does_not(
    data: st.DataObject,
    action: str,
    place: Resource,
    identifier: str,
    tools: frozenset[str],
    datatypes: frozenset[str],
) -> None:
    whole = data.draw(AUTHORITIES)
    part = data.draw(narrower(whole))
    assume(is_part(part, whole))
    if allows(part, action, place, identifier, tools, datatypes):
        assert allows(whole, action, place, identifier, tools, datatypes)


@given(st.data(), RESOURCES)
def test_narrowing_to_a_resource_is_monotone(data: st.DataObject, resource: Resource) -> None:
    whole = data.draw(AUTHORITIES)
    part = data.draw(narrower(whole))
    assume(is_part(part, whole))
    try:
        of_part = part.for_resource(resource)
    except PolicyDenied:
        return
    assert is_part(of_part, whole.for_resource(resource))
    assert is_part(of_part, part)
    assert of_part.for_resource(resource) == of_part
    assert all(resource.contains(location) for location in of_part.resources())


@given(st.data())
def test_a_scope_only_narrows(data: st.DataObject) -> None:
    whole = data.draw(AUTHORITIES)
    wanted = data.draw(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=3, unique=True))
    try:
        part = whole.for_scope(" ".join(wanted))
    except PolicyDenied:
        return
    assert is_part(part, whole)
    assert set(part.scope().split(" ")) == set(wanted)


@pytest.mark.bears("TX09", "TX24")
@pytest.mark.parametrize(
    "scope",
    [
        "",
        " ",
        "ticket.write",
        "ticket.read ticket.write",
        "ticket.read ",
        "*",
        "ticket.*",
        "ticket.read\n",
        "a " * 10_000,
    ],
)
def test_a_wider_or_odd_scope_is_refused(scope: str) -> None:
    with pytest.raises(PolicyDenied) as refused:
        authority().for_scope(scope)
    assert refused.value.reason == "invalid_scope"


@pytest.mark.parametrize("scope", ["ticket.read\n", 'ticket.re"ad', "ticket.", "ticket.read " * 64 + "ticket.read"])
def test_a_family_of_actions_takes_no_odd_scope_for_one_of_its_own(scope: str) -> None:
    wide = authority(detail(actions=["ticket.*"]))
    assert wide.for_scope("ticket.read").scope() == "ticket.read"
    with pytest.raises(PolicyDenied) as refused:
        wide.for_scope(scope)
    assert refused.value.reason == "invalid_scope"


@pytest.mark.bears("TX12")
def test_a_resource_takes_the_details_that_concern_it() -> None:
    wide = authority(
        detail(locations=["https://x", "https://y/a"]),
        detail(locations=["https://x/a/b"], actions=["deep.read"]),
        detail(locations=["https://z"], actions=["far.read"]),
    )
    inner = wide.for_resource(Resource("https://x/a"))
    assert [(each.text, action) for d in inner.details for each in d.locations for action in d.actions] == [
        ("https://x/a/b", "deep.read"),
        ("https://x/a", "ticket.read"),
    ]
    with pytest.raises(PolicyDenied) as refused:
        wide.for_resource(Resource("https://q"))
    assert refused.value.reason == "invalid_target"


def test_a_limit_that_nobody_judges_allows_nothing() -> None:
    tickets = Resource("https://tickets.example.org")
    plain = authority(detail(identifier="4711"))
    assert plain.permits("ticket.read", tickets, "4711")
    assert plain.permits("ticket.read", Resource("https://tickets.example.org/tickets"), "4711")
    assert not plain.permits("ticket.read", tickets)
    assert not plain.permits("ticket.read", tickets, "4712")
    assert not plain.permits("ticket.write", tickets, "4711")
    assert not plain.permits("ticket.read", Resource("https://other.example.org"), "4711")
    limited = authority(detail(constraints={"tenant": "a"}, datatypes=["mail"]))
    assert not limited.permits("ticket.read", tickets)
    assert not limited.permits("ticket.read", tickets, enforced=["tenant"])
    assert not limited.permits("ticket.read", tickets, enforced=["datatypes"])
    assert limited.permits("ticket.read", tickets, enforced=["tenant", "datatypes"])
    assert limited.require("ticket.read", tickets, enforced=["tenant", "datatypes"]).constraints == {"tenant": "a"}
    with pytest.raises(PolicyDenied) as refused:
        limited.require("ticket.read", tickets)
    assert refused.value.reason == "insufficient_authorization"


@pytest.mark.bears("BG10")
def test_limits_that_need_a_counter_are_named() -> None:
    counted = detail(constraints={"max_calls": [{"call_class": "write", "count": 1}], "tenant": "a"})
    assert authority(counted, detail()).metered() == {"max_calls"}
    assert authority().metered() == frozenset()


def test_a_detail_narrows_its_actions_only_to_its_own() -> None:
    one = authority(detail(actions=["inv.*"])).details[0]
    assert one.only(("inv.read",)).actions == ("inv.read",)
    for wrong in ((), ("other",), ("inv.read", "other")):
        with pytest.raises(PolicyDenied):
            one.only(wrong)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["api", "https://x", "a.b"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["type", "locations", "actions", "constraints", "x"]), inner)
        ),
        max_leaves=12,
    )
)
@example([{"type": "api", "locations": [[]], "actions": [{}]}])
def test_no_value_is_more_than_refused(value: Any) -> None:
    try:
        parsed = Authority.parse(value)
    except Invalid as refused:
        reason = refused.reason
    else:
        assert Authority.parse(parsed.text()) == parsed
        return
    assert reason == "invalid_authorization_details"
