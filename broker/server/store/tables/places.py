"""Where a page goes on: rows in the order of their time, and of their id within it."""

import re
from datetime import datetime
from typing import Final

from broker.errors import Invalid
from broker.server.store.sql import micros

_PLACE: Final = re.compile(r"(?P<created>[0-9]{1,17})\.(?P<id>[A-Za-z0-9_-]{1,128})")


def place_after(token: str | None) -> tuple[int, str]:
    """Read a page token, None for the beginning; raises Invalid (``invalid_page_token``)."""
    if token is None:
        return -1, ""
    match = _PLACE.fullmatch(token)
    if match is None:
        raise Invalid("the page token is not one of ours", code="invalid_page_token")
    return int(match["created"]), match["id"]


def place_of(created_at: datetime, row_id: str) -> str:
    """Write the token of the page that follows this row."""
    return f"{micros(created_at)}.{row_id}"
