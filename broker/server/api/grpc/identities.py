"""SPIFFE IDs in requests, by what they must be: a member, a workload or an agent of the server's trust domain.

The words are SPIRE's, since its tools show them. Nothing is looked up here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from broker._proto.spire.api.types import spiffeid_pb2
from broker.errors import Invalid
from broker.server.identity.nodes import AGENT_PATH
from broker.spiffe import SpiffeId, TrustDomain

RESERVED_PATH = "/spire"
"""What begins with it is the server's and its agents'."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Say of what turns out to be Invalid within the block what it was to be; code and hint stay."""
    try:
        yield
    except Invalid as error:
        raise Invalid(f"{what}: {error.message}", code=error.reason, hint=error.hint) from None


def spiffe_id_of(message: spiffeid_pb2.SPIFFEID) -> SpiffeId:
    """Read a SPIFFE ID; raises InvalidSpiffeId."""
    return SpiffeId.of(TrustDomain(message.trust_domain), message.path)


def id_in(request: object, field: str) -> SpiffeId:
    """Read the ID in a field that must be set; raises Invalid."""
    if not request.HasField(field):  # type: ignore[attr-defined]  # every message that comes here has it
        raise Invalid("request must specify SPIFFE ID", code="invalid_spiffe_id")
    return spiffe_id_of(getattr(request, field))


def member(spiffe_id: SpiffeId, trust_domain: TrustDomain) -> SpiffeId:
    """Give an ID that has a path in the trust domain; raises Invalid for any other."""
    _require_in(spiffe_id, trust_domain)
    if not spiffe_id.path:
        raise _not(spiffe_id, "a member of", trust_domain, "path is empty")
    return spiffe_id


def workload(spiffe_id: SpiffeId, trust_domain: TrustDomain) -> SpiffeId:
    """Give an ID that a workload of the trust domain may have; raises Invalid for any other."""
    _require_in(spiffe_id, trust_domain)
    if not spiffe_id.path:
        raise _not(spiffe_id, "a workload in", trust_domain, "path is empty")
    if spiffe_id.path == RESERVED_PATH or spiffe_id.path.startswith(f"{RESERVED_PATH}/"):
        raise _not(spiffe_id, "a workload in", trust_domain, "path is in the reserved namespace")
    return spiffe_id


def agent(spiffe_id: SpiffeId, trust_domain: TrustDomain) -> SpiffeId:
    """Give an ID that a node agent of the trust domain may have; raises Invalid for any other."""
    _require_in(spiffe_id, trust_domain)
    if not spiffe_id.path:
        raise _not(spiffe_id, "an agent in", trust_domain, "path is empty")
    if not spiffe_id.path.startswith(f"{AGENT_PATH}/"):
        raise _not(spiffe_id, "an agent in", trust_domain, "path is not in the agent namespace")
    return spiffe_id


def _require_in(spiffe_id: SpiffeId, trust_domain: TrustDomain) -> None:
    if spiffe_id.trust_domain != trust_domain:
        raise Invalid(f'"{spiffe_id}" is not a member of trust domain "{trust_domain}"', code="invalid_spiffe_id")


def _not(spiffe_id: SpiffeId, what: str, trust_domain: TrustDomain, why: str) -> Invalid:
    return Invalid(f'"{spiffe_id}" is not {what} trust domain "{trust_domain}"; {why}', code="invalid_spiffe_id")
