"""The cases of x509-limbo (C2SP), read once; and the same chains made anew around keys that we hold."""

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography import x509

from broker.errors import InvalidSvid
from broker.spiffe import certificates
from broker.spiffe.chains import MAX_CHAIN, TrustAnchors, find_path

FOLDER = Path(os.environ.get("BROKER_VECTORS", "/nonexistent")) / "x509-limbo"
REASON = "BROKER_VECTORS does not name the folder of public vectors"
WHENEVER = datetime(2026, 1, 1, tzinfo=UTC)
"""Where a case does not say when."""


@dataclass(frozen=True)
class Case:
    """One case: a chain, what is trusted, when, and whether a web client accepts it."""

    members: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.members["id"])

    @property
    def accepted(self) -> bool:
        return bool(self.members["expected_result"] == "SUCCESS")

    @cached_property
    def moment(self) -> datetime:
        text = self.members["validation_time"]
        return datetime.fromisoformat(text) if text else WHENEVER

    @property
    def leaf_pem(self) -> str:
        return str(self.members["peer_certificate"])

    @property
    def others_pem(self) -> Sequence[str]:
        return list(self.members["untrusted_intermediates"])

    @property
    def trusted_pem(self) -> Sequence[str]:
        return list(self.members["trusted_certs"])


def cases() -> list[Case]:
    document = json.loads((FOLDER / "limbo_core.json").read_bytes())
    return [Case(one) for one in document["testcases"]]


def der_of(pem: str) -> bytes:
    return base64.b64decode("".join(line for line in pem.splitlines() if not line.startswith("-----")))


def loaded(pem: str) -> x509.Certificate | None:
    """The certificate, or None where the library cannot read it."""
    try:
        return x509.load_der_x509_certificate(der_of(pem))
    except ValueError:
        return None


def chain_verdict(case: Case) -> bool:
    """Whether our chain layer accepts the case."""
    anchors = []
    for pem in case.trusted_pem:
        try:
            anchors.append(certificates.load(der_of(pem)))
        except InvalidSvid:
            continue
    try:
        leaf = certificates.read(certificates.load(der_of(case.leaf_pem)))
        # Of the leaf rules only those that RFC 5280 shares: the suite's leaves are web sites.
        no_leaf = leaf.is_ca or leaf.constraints is not None or not (leaf.names_critical or leaf.subject().rdns)
        if no_leaf or 1 + len(case.others_pem) > MAX_CHAIN:
            return False
        others = [certificates.read_authority(certificates.load(der_of(pem))) for pem in case.others_pem]
        find_path(leaf, others, TrustAnchors(anchors), now=case.moment)
    except InvalidSvid:
        return False
    return True
