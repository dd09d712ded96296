"""SPIFFE-ID.md, line by line, at every place where the programs take a SPIFFE ID: all of them say the same."""

import json
import os
import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker._proto.broker.server.v1 import entries_pb2, tasks_pb2
from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2, spiffeid_pb2
from broker.cli.main import main
from broker.clock import SystemClock
from broker.errors import BrokerError, InvalidSpiffeId
from broker.server.api.grpc import svid, tasks
from broker.server.settings import load
from broker.server.tasks.policy.bundle import PolicyRefused, read
from broker.spiffe import BundleSet, SpiffeId, TrustDomain, verify_jwt_svid
from broker.spiffe.jose import parse_compact
from broker.spiffe.x509svid import parse_x509_svid_id, split_der
from tests.conformance.house import DOMAIN, HEADER, SECONDS, House, reason

TD = "td.example"
REFUSED_ID = ("spiffe_id_", "trust_domain_")
"""How the codes of a text that is no SPIFFE ID begin; an ID of somebody else's trust domain has another code."""
KEY = ec.generate_private_key(ec.SECP256R1())
NO_PLACE = object()
"""A door that cannot carry such a text at all: ASN.1's IA5String holds no Unicode, an empty field asks for nothing."""


class Doors:
    """The places where a SPIFFE ID comes in; each says whether a text is one."""

    def __init__(self, house: House, directory: Path) -> None:
        self.house, self.directory = house, directory

    def library(self, text: str) -> Any:
        return self._parsed(lambda: SpiffeId(text))

    def registration(self, text: str) -> Any:
        if not text.startswith("spiffe://"):
            return NO_PLACE  # the message has two fields, and no scheme
        name, slash, path = text.removeprefix("spiffe://").partition("/")
        wanted = entry_pb2.Entry(
            spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain=name, path=slash + path),
            parent_id=spiffeid_pb2.SPIFFEID(trust_domain=DOMAIN.name, path="/none"),
            selectors=[selector_pb2.Selector(type="unix", value="uid:1")],
        )
        (result,) = self.house.create(entries_pb2.RegisteredEntry(entry=wanted))
        assert result.status.code == 3, "no text here is an ID of this trust domain"
        return '" is not a ' in result.status.message  # it was read, and is of elsewhere

    def command(self, text: str) -> Any:
        if text.startswith("-"):
            return NO_PLACE
        arguments = ["--spiffe-id", text, "--parent-id", "spiffe://td/x", "--selector", "unix:uid:1"]
        code = main(["entry", "create", "--dry-run", "-q", *arguments])
        assert code in {0, 2}
        return code == 0

    def settings(self, text: str) -> Any:
        file = self.directory / "server.toml"
        file.write_text(f"[server]\nadmin_ids = [{json.dumps(text)}]\n", "utf-8")
        try:
            load(file, {})
        except BrokerError:
            return False
        return True

    def request(self, text: str) -> Any:
        try:
            name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(text)])
        except ValueError:
            return NO_PLACE
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(name, False)
        wanted = svid_pb2.MintX509SVIDRequest(csr=builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER))
        with self.house.admin() as channel:
            return self._judged(
                reason(lambda: Stub(channel, svid.BINDING).MintX509SVID(wanted, timeout=SECONDS)), "invalid_spiffe_id"
            )

    def subject_at_the_agent(self, text: str) -> Any:
        wanted = workload_pb2.ValidateJWTSVIDRequest(audience="tests", svid=self.house.replica.token(sub=text))
        with self.house.workload() as stub:
            return self._judged(
                reason(lambda: stub.ValidateJWTSVID(wanted, metadata=HEADER, timeout=SECONDS)),
                "svid_no_bundle", "svid_root_path",
            )  # fmt: skip

    def subject_at_a_verifier(self, text: str) -> Any:
        token = self.house.replica.token(sub=text)
        return self._parsed(
            lambda: verify_jwt_svid(token, self.house.bundles, audience="tests", now=SystemClock().now()),
            "svid_no_bundle", "svid_root_path",
        )  # fmt: skip

    def certificate_at_the_port(self, text: str) -> Any:
        try:
            leaf = self.house.replica.leaf(text)
        except ValueError:
            return NO_PLACE
        return self._judged(self.house.present(leaf).code, "svid_no_bundle", "svid_root_path")

    def bundle_map(self, text: str) -> Any:
        if ":/" not in text:
            return NO_PLACE  # there it is the name of a trust domain, which has no scheme
        return self._parsed(lambda: BundleSet.parse_map(json.dumps({"trust_domains": {text: {"keys": []}}})))

    def policy(self, text: str) -> Any:
        # A rule about somebody who cannot be would permit nothing, which is bad, or forbid nothing, which is worse.
        written = re.sub(r"[^a-zA-Z0-9:/._-]", lambda found: f"\\u{{{ord(found[0]):x}}}", text)
        rule = f'@id("one") permit (principal == Agent::"{written}", action, resource);'
        try:
            read(rule)
        except PolicyRefused as refused:
            return {problem.code for problem in refused.problems} != {"policy_literal"}
        return True

    def tasks_of(self, text: str) -> Any:
        if not text:
            return NO_PLACE
        with self.house.admin() as channel:
            stub = Stub(channel, tasks.BINDING)
            return self._judged(
                reason(lambda: stub.ListTasks(tasks_pb2.ListTasksRequest(agent=text), timeout=SECONDS)), ""
            )

    @staticmethod
    def _judged(code: str, *otherwise: str) -> bool:
        if code.startswith(REFUSED_ID):
            return False
        assert code in otherwise, code
        return True

    def _parsed(self, parse: Callable[[], object], *otherwise: str) -> bool:
        try:
            parse()
        except BrokerError as error:
            return self._judged(error.reason, *otherwise)
        return True


DOORS = (
    "library", "registration", "command", "settings", "request", "subject_at_the_agent", "subject_at_a_verifier",
    "certificate_at_the_port", "bundle_map", "policy", "tasks_of",
)  # fmt: skip


@pytest.fixture
def doors(house: House, tmp_path: Path) -> Doors:
    return Doors(house, tmp_path)


def agreed(doors: Doors, text: str) -> bool:
    """Ask every door; give what all of them say."""
    said = {name: getattr(doors, name)(text) for name in DOORS}
    verdicts = {name: verdict for name, verdict in said.items() if verdict is not NO_PLACE}
    assert len(set(verdicts.values())) == 1, f"{text!r}: {verdicts}"
    assert len(verdicts) >= 5, f"{text!r}: {verdicts}"
    return verdicts["library"] is True


def every(characters: str, *, but: str) -> Iterator[str]:
    return (one for one in characters if one not in but)


PATH_CHARACTERS = string.ascii_letters + string.digits + ".-_"
NAME_CHARACTERS = string.ascii_lowercase + string.digits + ".-_"
LONGEST = f"spiffe://{TD}/".ljust(2048, "a")


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        pytest.param(
            [f"spiffe://{TD}/a"], [f"{scheme}{TD}/a" for scheme in ("", "//", "http://", "spiffes://", "spiffe:", "spiffe:/")],
            marks=pytest.mark.bears("ID-01"), id="the scheme is spiffe",
        ),
        pytest.param([], ["spiffe://", "spiffe:///", "spiffe:///a"], marks=pytest.mark.bears("ID-02"), id="a trust domain"),
        pytest.param(
            [], [f"spiffe://{TD}{end}" for end in ("?x=1", "#f", "/a?x=1", "/a#f", "/a?", "/a#")],
            marks=pytest.mark.bears("ID-03"), id="no query, no fragment",
        ),
        pytest.param(
            [], [f"spiffe://{front}/a" for front in (f"user@{TD}", f"user:pw@{TD}", f"@{TD}", f"{TD}:80", f"{TD}:")],
            marks=pytest.mark.bears("ID-04"), id="no user, no port",
        ),
        pytest.param(
            [], ["spiffe://TD.example/a", "spiffe://td.Example/a", "spiffe://td.exam\u212ale/a"],
            marks=pytest.mark.bears("ID-05"), id="the trust domain in lower case",
        ),
        pytest.param(
            [f"spiffe://{NAME_CHARACTERS}/a"], [f"spiffe://t{one}d/a" for one in every(string.printable, but=NAME_CHARACTERS + "/")],
            marks=pytest.mark.bears("ID-06"), id="characters of the trust domain",
        ),
        pytest.param(
            [], ["spiffe://t%64/a", "spiffe://%74d/a", "spiffe://td%2e/a"],
            marks=pytest.mark.bears("ID-07"), id="nothing percent-encoded in the trust domain",
        ),
        pytest.param(
            ["spiffe://192.0.2.1/a", "spiffe://1/a", "spiffe://-/a", "spiffe://a..b/a", "spiffe://_/a"],
            ["spiffe://[2001:db8::1]/a", "spiffe://2001:db8::1/a"],
            marks=pytest.mark.bears("ID-08"), id="no matter whether it looks like an address or a DNS name",
        ),
        pytest.param(
            [], [f"spiffe://{TD}/%61", f"spiffe://{TD}/a%2fb", f"spiffe://{TD}/a%"],
            marks=pytest.mark.bears("ID-09"), id="nothing percent-encoded in the path",
        ),
        pytest.param(
            [f"spiffe://{TD}/...", f"spiffe://{TD}/.a", f"spiffe://{TD}/a."],
            [f"spiffe://{TD}{path}" for path in ("//", "//a", "/a//b", "/.", "/..", "/a/./b", "/a/../b", "/../a")],
            marks=pytest.mark.bears("ID-10"), id="no empty and no dot segments",
        ),
        pytest.param(
            [], [f"spiffe://{TD}/", f"spiffe://{TD}/a/"], marks=pytest.mark.bears("ID-11"), id="no final slash"
        ),
        pytest.param(
            [f"spiffe://{TD}/{PATH_CHARACTERS}"],
            [f"spiffe://{TD}/a{one}b" for one in (*every(string.printable, but=PATH_CHARACTERS + "/"), "\x00", "\u212a", "é")],
            marks=pytest.mark.bears("ID-12"), id="characters of the path",
        ),
        pytest.param([LONGEST], [], marks=pytest.mark.bears("ID-13"), id="2048 bytes"),
        pytest.param([], [LONGEST + "a"], marks=pytest.mark.bears("ID-14"), id="not more"),
        pytest.param(
            [f"spiffe://{'a' * 255}/a"], [f"spiffe://{'a' * 256}/a"], marks=pytest.mark.bears("ID-15"), id="255 bytes of it"
        ),
        pytest.param(
            [f"spiffe://{TD}/A"], [f"SPIFFE://{TD}/a", f"Spiffe://{TD}/a"],
            marks=pytest.mark.bears("ID-16"), id="upper case is refused, not folded",
        ),
    ],
)  # fmt: skip
def test_every_door_says_the_same(
    doors: Doors, good: list[str], bad: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert [text for text in good if not agreed(doors, text)] == []
    assert [text for text in bad if agreed(doors, text)] == []


@pytest.mark.bears("ID-16")
def test_the_path_is_compared_byte_by_byte() -> None:
    assert SpiffeId(f"spiffe://{TD}/A") != SpiffeId(f"spiffe://{TD}/a")


@pytest.mark.bears("ID-14")
def test_nothing_longer_is_made() -> None:
    with pytest.raises(InvalidSpiffeId):
        SpiffeId.of(TrustDomain(TD), "/" + "a" * 2048)


@pytest.mark.bears("ID-20")
def test_id_and_key_are_in_what_is_signed(house: House) -> None:
    answer = house.x509().svids[0]
    leaf = x509.load_der_x509_certificate(split_der(answer.x509_svid)[0])
    assert str(parse_x509_svid_id(leaf)) == answer.spiffe_id
    assert answer.spiffe_id.encode() in leaf.tbs_certificate_bytes
    assert leaf.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint) in leaf.tbs_certificate_bytes
    token = house.jwt("tests").svids[0]
    assert parse_compact(token.svid).payload["sub"] == token.spiffe_id


@pytest.mark.bears("ID-21")
def test_documents_are_of_defined_types(house: House) -> None:
    chain = split_der(house.x509().svids[0].x509_svid)
    assert all(x509.load_der_x509_certificate(one).version is x509.Version.v3 for one in chain)
    assert parse_compact(house.jwt("tests").svids[0].svid).typ == "JWT"


if "BROKER_VECTORS" in os.environ:
    VECTORS = json.loads((Path(os.environ["BROKER_VECTORS"]) / "spiffe_ids.json").read_bytes())
else:
    VECTORS = None


@pytest.mark.bears("I03")
@pytest.mark.skipif(VECTORS is None, reason="BROKER_VECTORS does not name the folder of public vectors")
def test_the_vectors_of_four_libraries_at_every_door(doors: Doors, capsys: pytest.CaptureFixture[str]) -> None:
    assert [case["id"] for case in VECTORS["valid"] if not agreed(doors, case["id"])] == []
    assert [case["id"] for case in VECTORS["invalid"] if agreed(doors, case["id"])] == []
