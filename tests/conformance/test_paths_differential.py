"""Path building as BetterTLS asks it, beside ``openssl verify`` and pyca's: of many ways to an anchor, the good one is found; I13.

Two authorities are certified by the root and by each other. Each of these four certificates is there, is not, or has a defect;
and whatever of them is good, there is a way to the root or there is none.
"""

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from broker.errors import InvalidSvid
from broker.spiffe import Bundle, BundleSet, TrustDomain, verify_x509_svid
from tests.fakes.svid_pki import Holder, Pki

NOW = datetime(2026, 3, 1, tzinfo=UTC)
DEFECTS: dict[str, dict[str, Any]] = {
    "expired": {"start": timedelta(days=-2), "end": timedelta(days=-1)},
    "not yet valid": {"start": timedelta(days=1), "end": timedelta(days=2)},
    "for other purposes": {"purposes": [ExtendedKeyUsageOID.EMAIL_PROTECTION]},
    "no authority": {"ca": False, "usage": ("digital_signature",)},
    "signs no certificates": {"usage": ("crl_sign",)},
}
OF_THE_WAY = {"expired", "not yet valid"}
"""Defects that spoil a way only. With another one a certificate is none of an authority of ours, and who presents it is refused."""


class Graph:
    """The four certificates, good and with each defect; all of one root."""

    def __init__(self) -> None:
        pki = Pki(NOW)
        self.root = pki.root()
        first, second = pki.intermediate(self.root, "first"), pki.intermediate(self.root, "second")
        self.leaf = pki.leaf(first)
        edges = ((self.root, first), (self.root, second), (second, first), (first, second))

        def certified(issuer: Holder, subject: Holder, **changes: Any) -> Holder:
            return pki.intermediate(issuer, "first" if subject is first else "second", key=subject.key, **changes)

        self.good = [certified(*edge) for edge in edges]
        self.bad = {name: [certified(*edge, **changes) for edge in edges] for name, changes in DEFECTS.items()}

    def cases(self, defect: str) -> Iterator[tuple[str, list[Holder], bool]]:
        """Every state of the four: its letters (good, bad, none), what is presented beside the leaf, whether a way is good."""
        for letters in itertools.product("gbn", repeat=4):
            states = zip(letters, self.good, self.bad[defect], strict=True)
            others = [good if letter == "g" else bad for letter, good, bad in states if letter != "n"]
            by_root, second_by_root, by_second, _ = (letter == "g" for letter in letters)
            yield "".join(letters), others, by_root or (second_by_root and by_second)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Graph()


def ours(graph: Graph, others: list[Holder]) -> bool:
    bundles = BundleSet.of(Bundle(TrustDomain("example.org"), (graph.root.certificate,)))
    try:
        verify_x509_svid([one.der for one in (graph.leaf, *others)], bundles, now=NOW)
    except InvalidSvid:
        return False
    return True


def pyca(graph: Graph, others: list[Holder]) -> bool:
    verifier = PolicyBuilder().store(Store([graph.root.certificate])).time(NOW).build_client_verifier()
    try:
        verifier.verify(graph.leaf.certificate, [one.certificate for one in others])
    except VerificationError:
        return False
    return True


def openssl(graph: Graph, others: list[Holder], directory: Path) -> bool:
    files = {"leaf": [graph.leaf], "others": others, "root": [graph.root]}
    for name, holders in files.items():
        pem = b"".join(one.certificate.public_bytes(Encoding.PEM) for one in holders)
        (directory / name).write_bytes(pem)
    command = ["openssl", "verify", "-no-CApath", "-no-CAstore", "-CAfile", "root", "-attime", f"{NOW.timestamp():.0f}"]
    command += ["-untrusted", "others"] if others else []
    run = subprocess.run([*command, "leaf"], cwd=directory, capture_output=True, check=False, timeout=60)
    return run.returncode == 0


@pytest.mark.bears("I13", "X5-17")
@pytest.mark.parametrize("defect", DEFECTS)
def test_the_good_way_is_found_and_no_other(graph: Graph, defect: str) -> None:
    wrong, differing = {}, {}
    for letters, others, is_good in graph.cases(defect):
        for order in (others, others[::-1]):
            accepted = ours(graph, order)
            expected = is_good if defect in OF_THE_WAY else is_good and "b" not in letters
            if accepted != expected:
                wrong[letters] = accepted
            if pyca(graph, order) != is_good:
                differing[letters] = not is_good
    assert wrong == {}
    # A control: the other verifier, whose rules for the way are the same, finds the same ways.
    assert differing == {}


@pytest.mark.bears("I13")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl command")
def test_openssl_finds_no_way_that_we_refuse(graph: Graph, tmp_path: Path) -> None:
    verdicts = {
        letters: (ours(graph, others), openssl(graph, others, tmp_path))
        for letters, others, _ in graph.cases("expired")
    }
    assert {letters for letters, (mine, theirs) in verdicts.items() if theirs and not mine} == set()
    assert {letters for letters, (mine, theirs) in verdicts.items() if mine and not theirs} == set()
