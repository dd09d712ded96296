"""The three places where a JWT-SVID is judged: the node agent, a verifier's library, and the token exchange's actor_token."""

from contextlib import ExitStack
from dataclasses import dataclass
from urllib.parse import urlencode

from broker._proto.spiffe import workload_pb2
from broker.clock import SystemClock
from broker.errors import InvalidSvid
from broker.server.api.http.token_formats import ACCESS_TOKEN, GRANT_TYPE, JWT
from broker.spiffe import verify_jwt_svid
from broker.transport.tls import TlsIdentity
from tests.conformance.house import HEADER, ONE, SECONDS, House, posted, reason

NO_FORM = frozenset({"body_too_large", "form_encoding", "parameter_empty"})
"""Where the text cannot even be a parameter, the form is refused before anybody looks at the token."""


@dataclass(frozen=True)
class Verdicts:
    """The code of each door's refusal; empty where it accepts."""

    agent: str
    library: str
    exchange: str

    @property
    def accepted(self) -> bool:
        """What all three say; they must agree."""
        said = {self.agent == "", self.library == "", self.exchange == ""}
        assert len(said) == 1, self
        # The exchange says only that the actor token is no good; the others say what is wrong with it, in the same word.
        assert self.agent == self.library or self.agent == "svid_missing", self
        assert self.exchange in {"", "actor_token", *NO_FORM}, self
        return self.agent == ""


class TokenDoors:
    """Asks all three, over two connections that stay open. Tokens are for the server's issuer: the exchange takes no others."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.audience = house.issuer
        leaf = house.replica.leaf(ONE)
        self._stack = ExitStack()
        self._https = house.https(TlsIdentity((leaf.der,), leaf.key))
        self._stack.callback(self._https.close)
        self._workload = self._stack.enter_context(house.workload())

    def close(self) -> None:
        self._stack.close()

    def ask(self, token: str) -> Verdicts:
        return Verdicts(self.agent(token), self.library(token), self.exchange(token))

    def agent(self, token: str) -> str:
        wanted = workload_pb2.ValidateJWTSVIDRequest(audience=self.audience, svid=token)
        return reason(lambda: self._workload.ValidateJWTSVID(wanted, metadata=HEADER, timeout=SECONDS))

    def library(self, token: str) -> str:
        try:
            verify_jwt_svid(token, self.house.bundles, audience=self.audience, now=SystemClock().now())
        except InvalidSvid as error:
            return error.reason
        return ""

    def exchange(self, token: str) -> str:
        form = {
            "grant_type": GRANT_TYPE,
            "subject_token": "asked for after the actor's",
            "subject_token_type": ACCESS_TOKEN,
            "actor_token": token,
            "actor_token_type": JWT,
        }
        answer = posted(self._https, "/token", urlencode(form))
        if answer.status == 413:
            return "body_too_large"
        assert answer.status == 400, answer
        # A good actor token: the next thing that is looked at is the resource, which is missing.
        return "" if answer.code == "invalid_target" else answer.code
