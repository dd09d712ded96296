"""Counts what a stranger makes a server do: JSON read, certificates parsed, signatures checked.

Counted and not timed: seconds also hold whatever else the machine and the test's own process do in them.
"""

from dataclasses import dataclass
from typing import Any, Self

import pytest

from broker.attestation.base64_json import text
from broker.spiffe import certificates, strictjson
from broker.spiffe.chains import _Search


@dataclass
class Costs:
    """What one message of evidence cost. A server that parses its own authorities meanwhile does not count."""

    json: int = 0
    """Readings of it as JSON. Size and depth are judged before."""
    certificates: int = 0
    """Parsed, of those in it. Their number and size are judged before."""
    signatures: int = 0
    """Checked in path validation."""

    @classmethod
    def of(cls, message: bytes, monkeypatch: pytest.MonkeyPatch) -> Self:
        """Count from now on to the test's end."""
        counted = cls()
        spend, decode, parse = _Search._spend, strictjson._DECODER.decode, certificates.x509.load_der_x509_certificate

        def spent(search: _Search) -> None:
            counted.signatures += 1
            spend(search)

        def decoded(content: str) -> Any:
            counted.json += content.encode() == message
            return decode(content)

        def parsed(der: bytes) -> Any:
            counted.certificates += text(der).encode() in message
            return parse(der)

        monkeypatch.setattr(_Search, "_spend", spent)
        monkeypatch.setattr(strictjson._DECODER, "decode", decoded)
        monkeypatch.setattr(certificates.x509, "load_der_x509_certificate", parsed)
        return counted
