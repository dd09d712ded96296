"""JSONTestSuite at every place where JSON comes in from outside: what has no one meaning is refused, and nothing breaks; I14.

A text of the suite is put where a value may stand, so that what is good can be accepted: as a claim of a token, as a further
member of a bundle. Where only one shape is taken, every text is refused, and by an error of ours.
"""

import ast
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.json_format import MessageToDict

import attestors
import broker
from broker._proto.spiffe import workload_pb2
from broker.attestation.possession import Challenge, answer, read_chain
from broker.cli.main import main
from broker.errors import BrokerError, Invalid, InvalidToken, Unavailable
from broker.server.api.http.form import MAX_BODY
from broker.server.api.http.token_formats import ACCESS_TOKEN, GRANT_TYPE
from broker.server.tasks.config import SubjectIssuer
from broker.server.tasks.issuer_keys import REFRESH_EVERY, IssuerKeys
from broker.spiffe import Bundle, BundleSet, jose
from broker.tasks import Authority
from broker.tasks.keyset import read_keys
from broker.transport.tls import TlsIdentity
from tests.conformance.house import DOMAIN, HEADER, ONE, SECONDS, House, posted
from tests.conformance.test_vectors_spiffe import DUPLICATES, OPEN_ACCEPTED
from tests.conformance.token_doors import TokenDoors
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import ManualClock

SUITE = Path(os.environ.get("BROKER_VECTORS", "/nonexistent")) / "JSONTestSuite" / "test_parsing"
TEXTS = {path.name: path.read_bytes() for path in sorted(SUITE.iterdir())} if SUITE.is_dir() else {}
pytestmark = [
    pytest.mark.skipif(not TEXTS, reason="BROKER_VECTORS does not name the folder of public vectors"),
    pytest.mark.timeout(180),
]
GOOD = {name for name in TEXTS if name.startswith("y_") and name not in DUPLICATES} | OPEN_ACCEPTED
KEY = ec.generate_private_key(ec.SECP256R1())
DEEP = b"[" * 100_000 + b"]" * 100_000


def among(members: bytes, text: bytes) -> bytes:
    """An object with one more member, whose value is the text."""
    return members.rstrip()[:-1] + b', "x": ' + text + b"}"


@pytest.fixture
def doors(house: House) -> Iterator[TokenDoors]:
    with closing(TokenDoors(house)) as one:
        yield one


@pytest.mark.bears("I14")
def test_as_a_claim_of_a_token(house: House, doors: TokenDoors) -> None:
    header = json.dumps(house.replica.header())
    claims = json.dumps(house.replica.claims(aud=[doors.audience])).encode()
    tokens = {name: house.replica.raw(header, among(claims, text)) for name, text in TEXTS.items()}
    said = {name: doors.ask(token).accepted for name, token in tokens.items() if len(token) < jose.MAX_TOKEN}
    assert {name for name, accepted in said.items() if accepted} == GOOD
    assert not any(doors.ask(tokens[name]).accepted for name in tokens.keys() - said.keys())


@pytest.mark.bears("I14")
def test_the_agent_repeats_what_it_read(house: House, doors: TokenDoors) -> None:
    # The claims come back through protobuf's own idea of JSON: numbers are doubles there, and nothing else changes.
    header, claims = json.dumps(house.replica.header()), json.dumps(house.replica.claims()).encode()
    with house.workload() as stub:
        for name in sorted(GOOD):
            wanted = workload_pb2.ValidateJWTSVIDRequest(
                audience="tests", svid=house.replica.raw(header, among(claims, TEXTS[name]))
            )
            answered = stub.ValidateJWTSVID(wanted, metadata=HEADER, timeout=SECONDS)
            assert MessageToDict(answered.claims)["x"] == json.loads(TEXTS[name]), name


@pytest.mark.bears("I14")
def test_as_a_header_of_a_token(house: House, doors: TokenDoors) -> None:
    claims = json.dumps(house.replica.claims(aud=[doors.audience]))
    for name, text in TEXTS.items():
        if len(text) < jose.MAX_HEADER:
            assert not doors.ask(house.replica.raw(text, claims)).accepted, name
    assert not doors.ask(house.replica.raw(DEEP[:2000], claims)).accepted


@pytest.mark.bears("I14")
@pytest.mark.parametrize(
    "read",
    [
        lambda text: Bundle.parse(DOMAIN, among(b'{"keys": []}', text)),
        lambda text: Bundle.from_workload_api(DOMAIN, jwks=among(b'{"keys": []}', text)),
        lambda text: BundleSet.parse_map(among(b'{"trust_domains": {}}', text)),
        lambda text: BundleSet.parse_map(b'{"trust_domains": {"a.test": ' + among(b'{"keys": []}', text) + b"}}"),
        lambda text: read_keys(among(b'{"keys": []}', text)),
    ],
    ids=["bundle", "key set of the Workload API", "bundle map", "bundle within a map", "task-token keys"],
)
def test_as_a_member_of_what_is_published(read: Callable[[bytes], object]) -> None:
    accepted = set()
    for name, text in TEXTS.items():
        try:
            read(text)
        except Invalid:
            continue
        accepted.add(name)
    assert accepted == GOOD
    with pytest.raises(Invalid):
        read(DEEP)


def proof(text: bytes) -> object:
    return Challenge.to(KEY.public_key()).check(text)


@pytest.mark.bears("I14")
@pytest.mark.parametrize(
    "read",
    [
        lambda text: read_chain(text, 5),
        proof,
        lambda text: answer(KEY, text),
        lambda text: Authority.parse(text.decode("utf-8", "surrogateescape")),
        lambda text: jose.public_key_from_jwk({"kty": text.decode("latin-1")}),
    ],
    ids=["node's evidence", "node's proof", "server's challenge", "authorization details", "key type"],
)
def test_where_only_one_shape_is_taken(read: Callable[[bytes], object]) -> None:
    accepted = []
    for name, text in {**TEXTS, "deep": DEEP}.items():
        try:
            read(text)
        except BrokerError:
            continue
        accepted.append(name)
    assert accepted == []


@pytest.mark.bears("I14")
def test_at_the_exchange(house: House) -> None:
    # Whatever stands in authorization_details, the answer is a refusal with a code, and never an internal error.
    leaf = house.replica.leaf(ONE)
    with closing(house.https(TlsIdentity((leaf.der,), leaf.key))) as connection:
        for name, text in {**TEXTS, "deep": DEEP[:30_000]}.items():
            form = f"grant_type={quote(GRANT_TYPE, safe='')}&subject_token=x&subject_token_type={quote(ACCESS_TOKEN, safe='')}"
            form += (
                f"&resource={quote('https://tickets.dev.test', safe='')}&authorization_details={quote(text, safe='')}"
            )
            told = posted(connection, "/token", form)
            assert told.status in {400, 413}, (name, told)
            assert told.status == 413 or told.code in {
                "invalid_authorization_details", "form_encoding", "parameter_empty", "body_too_large",
            }, (name, told)  # fmt: skip
            if told.status == 413:
                connection.close()


@pytest.mark.bears("I14")
@pytest.mark.parametrize(
    ("path", "within"),
    [
        ("/tasks", b'{"purpose": "x", "subject_token": "x", "authorization_details": [{"type": '),
        ("/delegations", b""),
        ("/approvals/apr_1/approve", b""),
    ],
    ids=["authorization details within a task", "a delegation", "a person's yes"],
)
def test_as_a_body_of_ours(house: House, path: str, within: bytes) -> None:
    # JSON that is none is said to be none; any other makes no sense here, and that is what is said of it.
    leaf = house.replica.leaf(ONE)
    headers = {"content-type": "application/json"}
    if path != "/tasks":
        headers["authorization"] = "Bearer x"  # a user's own
    with closing(house.https(TlsIdentity((leaf.der,), leaf.key))) as connection:
        for name, text in {**TEXTS, "deep": DEEP[:30_000] + DEEP[-30_000:]}.items():
            body = within + text + b"}]}" if within else text
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            said = json.loads(response.read())
            code = said["error_code"]
            if len(body) > MAX_BODY:
                assert code == "body_too_large", name
                continue
            assert response.status in {400, 401, 403}, (name, said)
            if body:
                # A fraction is good JSON and has no canonical form, which authorization details need.
                is_none = code == "invalid_json" or (code.startswith("json_") and code != "json_bad_type")
                assert is_none is (name not in GOOD), (name, said)


@pytest.mark.bears("I14")
async def test_in_what_a_users_issuer_publishes(tmp_path: Path) -> None:
    # As one more member of a key set with a new key: that is known from then on where the text is good.
    clock, accepted = ManualClock(), set()
    with OidcIssuer.start(tmp_path) as issuer:
        trusted = SubjectIssuer(issuer=issuer.issuer, audiences=frozenset({"broker"}), ca_path=issuer.ca_path)
        keys = IssuerKeys(trusted, clock, address=f"{issuer.issuer}/jwks")
        for name, text in {**TEXTS, "deep": DEEP[:20_000] + DEEP[-20_000:]}.items():
            issuer.keys[0].kid = name
            published = among(json.dumps({"keys": [issuer.keys[0].jwk()]}).encode(), text)
            issuer.document = lambda path, published=published: published  # type: ignore[method-assign]
            clock.advance(REFRESH_EVERY)
            with suppress(InvalidToken, Unavailable):
                await keys.find(name)
                accepted.add(name)
        await keys.aclose()
    assert accepted == GOOD


@pytest.mark.bears("I14")
def test_in_a_file_of_relationships(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A good file without a relationship asks for nothing; any other is invalid input, and no internal error.
    file = tmp_path / "relationships.json"
    for name, text in {**TEXTS, "deep": DEEP}.items():
        file.write_bytes(among(b'{"federationRelationships": []}', text))
        assert (main(["federation", "create", "--dry-run", "--data", str(file)]) == 2) is (name not in GOOD), name
    assert "Traceback" not in capsys.readouterr().err


OWN_TEXTS = {
    "broker/cli/bundle_texts.py": "reads what it wrote a moment before, to indent it",
    "broker/cli/helper_conf.py": "reads one quoted word of another format, whose form was looked at before",
    "broker/server/identity/changes.py": "reads what this server wrote into its own store",
    "broker/server/identity/federated.py": "the same",
    "broker/server/identity/revocation.py": "the same",
    "broker/server/store/bundle_rows.py": "the same",
    "broker/server/store/tables/revocations.py": "the same",
    "broker/server/store/tables/supervision.py": "the same",
    "broker/server/tasks/feed.py": "the same",
    "broker/server/tasks/policy/bundles.py": "the same",
    "broker/server/tasks/supervisor.py": "the same",
    "broker/server/tasks/policy/cedar.py": "reads what the policy engine wrote a moment before",
    "broker/dev/issuer.py": "the development issuer talks to its own processes",
    "broker/dev/lines.py": "the same",
    "broker/dev/pod.py": "the same",
    "broker/dev/record.py": "the same",
    "broker/dev/stage.py": "the same",
}


@pytest.mark.bears("I14")
def test_there_is_no_other_reader() -> None:
    roots = [Path(str(package.__file__)).parent for package in (broker, attestors)]
    found = set()
    for root in roots:
        for file in root.rglob("*.py"):
            source = file.read_text("utf-8")
            if "json" not in source or file.name.endswith("_pb2.py"):
                continue
            calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
            names = {ast.unparse(node.func) for node in calls if isinstance(node.func, ast.Attribute | ast.Name)}
            if names & {"json.loads", "json.load", "json.JSONDecoder"} and file.name != "strictjson.py":
                found.add(str(file.relative_to(root.parent)))
    assert found == set(OWN_TEXTS)
