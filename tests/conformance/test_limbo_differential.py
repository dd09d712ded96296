"""Our path validation beside ``openssl verify`` and pyca's, on every case of x509-limbo; I13."""

import contextlib
import ipaddress
import shutil
import subprocess
from pathlib import Path

import cryptography
import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from tests.conformance import limbo
from tests.conformance.limbo import Case
from tests.conformance.limbo_rows import OPENSSL, PYCA, ROWS

pytestmark = [
    pytest.mark.skipif(not limbo.FOLDER.is_dir(), reason=limbo.REASON),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl command"),
    pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning"),
    pytest.mark.timeout(180),
]


def openssl(case: Case, directory: Path) -> bool:
    """What ``openssl verify`` says."""
    leaf, others, trusted = (directory / name for name in ("leaf.pem", "others.pem", "trusted.pem"))
    leaf.write_text(case.leaf_pem)
    others.write_text("\n".join(case.others_pem))
    trusted.write_text("\n".join(case.trusted_pem))
    command = ["openssl", "verify", "-partial_chain", "-no-CApath", "-no-CAstore", "-CAfile", str(trusted)]
    command += ["-attime", str(int(case.moment.timestamp()))]
    command += ["-untrusted", str(others)] if case.others_pem else []
    done = subprocess.run([*command, str(leaf)], capture_output=True, check=False, timeout=60)
    return done.returncode == 0


def pyca(case: Case) -> bool:
    """What the verifier of ``cryptography`` says, whose profile is that of public web sites."""
    name, depth = case.members["expected_peer_name"], case.members["max_chain_depth"]
    with contextlib.suppress(
        ValueError,
        TypeError,
        VerificationError,
        UnsupportedAlgorithm,
        x509.UnsupportedGeneralNameType,
        x509.InvalidVersion,
    ):
        leaf, *others = [x509.load_pem_x509_certificate(pem.encode()) for pem in (case.leaf_pem, *case.others_pem)]
        store = Store([x509.load_pem_x509_certificate(pem.encode()) for pem in case.trusted_pem])
        policy = PolicyBuilder().store(store).time(case.moment)
        if depth is not None:
            policy = policy.max_chain_depth(depth)
        if name is None or case.members["validation_kind"] == "CLIENT":
            policy.build_client_verifier().verify(leaf, others)
            return True
        is_address = name["kind"] == "IP"
        subject = x509.IPAddress(ipaddress.ip_address(name["value"])) if is_address else x509.DNSName(name["value"])
        policy.build_server_verifier(subject).verify(leaf, others)
        return True
    return False


def letters(*verdicts: bool) -> str:
    return "".join("A" if verdict else "R" for verdict in verdicts)


@pytest.mark.bears("I13", "X5-17")
def test_no_row_is_looser_than_both_and_each_difference_is_written_down(tmp_path: Path) -> None:
    said = {
        case.id: letters(case.accepted, limbo.chain_verdict(case), openssl(case, tmp_path), pyca(case))
        for case in limbo.cases()
    }
    assert len(said) > 200
    # Where the suite refuses and both of the others do, so do we: whatever their versions.
    assert [name for name, row in said.items() if row == "RARR"] == []
    # Ours is exact: a row that is not written down is unanimous, or at least ours is the suite's.
    written = {name: row for name, (row, _) in ROWS.items()}
    assert {name: row[:2] for name, row in said.items() if row[0] != row[1]} == {
        name: row[:2] for name, row in written.items() if row[0] != row[1]
    }
    if are_the_versions_written_down():
        assert {name: row for name, row in said.items() if len(set(row)) > 1} == written


def are_the_versions_written_down() -> bool:
    version = subprocess.run(["openssl", "version"], capture_output=True, text=True, check=True, timeout=60).stdout
    return version.startswith(f"{OPENSSL}.") and cryptography.__version__.partition(".")[0] == PYCA


def test_the_command_can_refuse_and_accept(tmp_path: Path) -> None:
    # A control: without it, a command that always fails would look like a very strict peer.
    verdicts = {openssl(case, tmp_path) for case in limbo.cases()[:20]}
    assert verdicts == {True, False}


def test_every_written_row_is_a_difference_with_a_reason() -> None:
    assert all(
        len(set(row)) > 1 and set(row) <= {"A", "R"} and len(row) == 4 and reason for row, reason in ROWS.values()
    )
    assert {case.id for case in limbo.cases()} >= set(ROWS)
