"""Node attestation by a one-time join token, both halves; SPIRE's ``join_token`` on the wire.

The token is the whole payload. The server uses it up in the transaction that admits the node, so a second use, at the
same instant or later, is refused; the agent's SPIFFE ID is ``/spire/agent/join_token/<token>``. It cannot re-attest.
"""

import asyncio
import re
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from broker.attestation.contract import AttestedNode, AttestorFailed, ChallengeWith, Evidence
from broker.errors import Refused

NAME = "join_token"
MAX_TOKEN = 256  # a UUID is 36; the token becomes a path segment of the agent's SPIFFE ID
_TOKEN = re.compile(r"[A-Za-z0-9._-]{1,256}")  # what a path segment may hold (SPIFFE-ID §2.2)


class JoinTokenSettings(BaseModel):
    """Where the agent finds its token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    join_token: SecretStr | None = Field(default=None, description="The one-time token itself.")
    join_token_file: Path | None = Field(default=None, description="A file that holds the one-time token.")


class JoinTokenServerSettings(BaseModel):
    """The server's half has nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class JoinTokenAgent:
    """The agent's half: hands over the token from its settings, or from a file that is read at each attempt."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = JoinTokenSettings

    def __init__(self, settings: JoinTokenSettings) -> None:
        self._settings = settings

    async def evidence(self) -> Evidence:
        """Give the token; raises ``AttestorFailed`` when none is configured or the file cannot be read."""
        if self._settings.join_token is not None:
            token = self._settings.join_token.get_secret_value()
        elif self._settings.join_token_file is not None:
            token = await asyncio.to_thread(_read_token, self._settings.join_token_file)
        else:
            raise AttestorFailed("no join token", hint="set join_token or join_token_file: broker join-token create")
        if not _is_token(token):
            raise AttestorFailed(
                "the join token is not one", hint="a join token is one line of letters, digits and -._"
            )
        return Evidence(NAME, token.encode())

    async def respond(self, challenge: bytes) -> bytes:
        """Refuse: this attestor has no challenge."""
        raise AttestorFailed("the server challenged a join token, which has no answer")


class JoinTokenServer:
    """The server's half: names the node after its token and has the server use the token up."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = JoinTokenServerSettings

    def __init__(self, settings: JoinTokenServerSettings) -> None:
        self._settings = settings

    async def verify(self, evidence: Evidence, challenge_with: ChallengeWith) -> AttestedNode:
        """Check the form of the token; whether it is known and unused is decided where it is consumed."""
        token = evidence.payload.decode("ascii", errors="replace")
        if not _is_token(token):
            # The same answer as for an unknown token: the form is no oracle.
            raise Refused(
                "failed to attest: join token does not exist or has already been used", code="join_token_unknown"
            )
        return AttestedNode(path=f"/{NAME}/{token}", selectors=frozenset(), reattestable=False, consumes=token)


def _is_token(text: str) -> bool:
    return _TOKEN.fullmatch(text) is not None and text not in {".", ".."}


def _read_token(path: Path) -> str:
    try:
        with path.open(encoding="ascii", errors="replace") as token_file:
            # Tools write a final newline; anything else beside the token is refused by its form.
            return token_file.read(MAX_TOKEN + 2).rstrip("\r\n")
    except OSError as error:
        raise AttestorFailed(
            f"the join token file cannot be read: {error.strerror}",
            hint="join_token_file names a file that the agent's user can read",
        ) from error
