"""Path building on BetterTLS's own graphs, beside ``openssl verify`` and pyca's; I13.

Its certificates are made anew at each export and end a year later, so they are no vectors that could lie anywhere. Whoever has Go::

    go install github.com/Netflix/bettertls/test-suites/cmd/bettertls@v0.0.0-20250909192348-e1e99e353074
    bettertls export-tests --suite pathbuilding --out pathbuilding.json
    BROKER_BETTERTLS=$PWD/pathbuilding.json make test PYTEST_ARGS=tests/conformance/test_bettertls_differential.py
"""

import base64
import json
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.spiffe.chains import MAX_CHAIN
from tests.conformance.limbo import Case, chain_verdict
from tests.conformance.limbo_rows import UNRELATED
from tests.conformance.verifiers import letters, openssl, pyca

EXPORT = os.environ.get("BROKER_BETTERTLS", "")
pytestmark = [
    pytest.mark.skipif(not EXPORT, reason="BROKER_BETTERTLS does not name an export of BetterTLS"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl command"),
    pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning"),
    pytest.mark.timeout(180),
]
AFTER = timedelta(hours=24, minutes=1)
"""From a leaf's beginning to the moment of its case: what is expired has ended 23 hours after that beginning, the rest a year."""


STRICTER = {
    "INVALID_REASON_BAD_EKU": UNRELATED,
    "INVALID_REASON_DEPRECATED_CRYPTO": UNRELATED,
    "INVALID_REASON_MISSING_BASIC_CONSTRAINTS": UNRELATED,
    "INVALID_REASON_NOT_A_CA": UNRELATED,
}
"""Defects for which we refuse a whole message, whatever other way there is; and for more certificates than MAX_CHAIN, too."""


def read() -> list[tuple[Case, str, int]]:
    """The cases, with the defect that each has somewhere, and how many certificates are presented."""
    document = json.loads(Path(EXPORT).read_bytes())
    trusted = pem(document["trustRoot"])
    return [
        (
            case_of(one, trusted),
            "".join(name for name in one["requiredFeatures"] if name != "BRANCHING"),
            len(one["certificates"]),
        )
        for one in document["suites"]["pathbuilding"]["testCases"]
    ]


def case_of(exported: dict[str, Any], trusted: str) -> Case:
    leaf, *others = [pem(one) for one in exported["certificates"]]
    moment = x509.load_pem_x509_certificate(leaf.encode()).not_valid_before_utc + AFTER
    return Case({
        "id": f"bettertls::{exported['id']}",
        "expected_result": "SUCCESS" if exported["expected"] == "ACCEPT" else "FAILURE",
        "validation_time": moment.isoformat(),
        "validation_kind": "SERVER",
        "expected_peer_name": {"kind": "DNS", "value": exported["hostname"]},
        "max_chain_depth": None,
        "peer_certificate": leaf,
        "untrusted_intermediates": others,
        "trusted_certs": [trusted],
    })  # fmt: skip


def pem(der: str) -> str:
    certificate = x509.load_der_x509_certificate(base64.b64decode(der))
    return certificate.public_bytes(Encoding.PEM).decode()


@pytest.mark.bears("I13")
def test_every_graph_is_judged_as_the_suite_says_but_for_what_is_written_down() -> None:
    said = {(one.id, defect, count): (one.accepted, chain_verdict(one)) for one, defect, count in read()}
    assert len(said) > 80
    expected = {
        (name, defect, count): (accepted, accepted and defect not in STRICTER and count <= MAX_CHAIN)
        for (name, defect, count), (accepted, _) in said.items()
    }
    assert said == expected
    # A control: with every way good, whatever the branches, it is found.
    assert {ours for (_, defect, count), (_, ours) in said.items() if not defect and count <= MAX_CHAIN} == {True}


@pytest.mark.bears("I13")
def test_no_graph_is_looser_than_both_of_the_others(tmp_path: Path) -> None:
    rows = {
        one.id: letters(one.accepted, chain_verdict(one), openssl(one, tmp_path), pyca(one)) for one, _, _ in read()
    }
    assert [name for name, row in rows.items() if row == "RARR"] == []
    # A control: each of the others accepts some and refuses some, and not the same.
    assert {row[2] for row in rows.values()} == {row[3] for row in rows.values()} == {"A", "R"}
