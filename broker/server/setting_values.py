"""What a setting's text may be: durations, issuers, addresses of stores."""

import re
from datetime import timedelta
from typing import Annotated, Final

from pydantic import AfterValidator, SecretStr

from broker.settings import Duration as AnyDuration

MIN_TTL: Final = timedelta(seconds=1)

_STORE_URL: Final = re.compile(r"(?:sqlite:///[^\x00?#]+|postgres(?:ql)?://[^\x00]+)?")
_ISSUER: Final = re.compile(r"https://[A-Za-z0-9.\-]+(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~\-]+)*")


def _lives(value: timedelta) -> timedelta:
    if value < MIN_TTL:
        raise ValueError("a duration is at least one second here")
    return value


def _issuer(value: str) -> str:
    if _ISSUER.fullmatch(value) is None:
        raise ValueError("not an https URL without query, fragment and final slash")
    return value


def _store_url(value: SecretStr) -> SecretStr:
    if _STORE_URL.fullmatch(value.get_secret_value()) is None:
        raise ValueError("write sqlite:///absolute/path.db or postgresql://user@host/database")
    return value


Duration = Annotated[AnyDuration, AfterValidator(_lives)]
IssuerUrl = Annotated[str, AfterValidator(_issuer)]
StoreUrl = Annotated[SecretStr, AfterValidator(_store_url)]
