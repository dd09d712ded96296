"""Two verifiers that nobody here wrote, asked about a case: ``openssl verify`` and pyca's."""

import contextlib
import ipaddress
import subprocess
from pathlib import Path

import cryptography
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from tests.conformance.limbo import Case
from tests.conformance.limbo_rows import OPENSSL, PYCA


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


def are_the_versions_written_down() -> bool:
    version = subprocess.run(["openssl", "version"], capture_output=True, text=True, check=True, timeout=60).stdout
    return version.startswith(f"{OPENSSL}.") and cryptography.__version__.partition(".")[0] == PYCA
