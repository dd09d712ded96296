"""A small real PKI, made anew for each test, around a moment that does not move."""

from datetime import UTC, datetime

import pytest

from tests.fakes.svid_pki import BOTH, Holder, Pki, key_usage

__all__ = ["BOTH", "NOW", "Holder", "Pki", "key_usage"]

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)


@pytest.fixture
def pki() -> Pki:
    return Pki(NOW)
