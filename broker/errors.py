"""Every error this product raises on purpose: one root, a stable code, advice.

The tree, grouped by who must act::

    BrokerError
    ├── Refused            the caller may not
    │   ├── NoIdentity     no entry matches
    │   ├── NotAttested    the process or node could not be established
    │   └── PolicyDenied   authority, scope, binding or policy says no
    ├── Invalid            the caller sent nonsense
    │   ├── InvalidSpiffeId, InvalidTrustDomain, InvalidSelector, InvalidBundle, InvalidJson
    │   ├── InvalidSvid    an X.509- or JWT-SVID that does not verify
    │   └── InvalidToken   a user's or task token that does not verify
    ├── NotFound           no such thing
    ├── Conflict           it exists already, or its version moved on
    ├── Unavailable        try again
    └── Misconfigured      the operator must act

Each edge (gRPC, HTTP, command line) maps this tree in one table. Anything else that is raised is a defect: the edge
logs it under a reference number and shows only the number.
"""

from typing import ClassVar


class BrokerError(Exception):
    """The root: ``code`` is stable and machine-readable, ``hint`` says what to do next."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, code: str | None = None, hint: str = "") -> None:
        """Carry a sentence for people, a code for programs, and a hint."""
        super().__init__(message)
        self._code = code
        self.hint = hint

    @property
    def message(self) -> str:
        """The sentence for people, with no secret in it."""
        return str(self.args[0])

    @property
    def reason(self) -> str:
        """The stable code: the instance's own where it has one, else its class's."""
        return self._code or type(self).code


class Refused(BrokerError):
    """The caller may not."""

    code = "refused"


class NoIdentity(Refused):
    """No entry matches this workload. Outward always the same words, whatever the cause."""

    code = "no_identity_issued"


class NotAttested(Refused):
    """The process or the node could not be established."""

    code = "not_attested"


class PolicyDenied(Refused):
    """Authority, scope, binding or policy says no."""

    code = "policy_denied"


class Invalid(BrokerError):
    """The caller sent nonsense."""

    code = "invalid_request"


class InvalidJson(Invalid):
    """Not the JSON that the standards allow: duplicate names, NaN, wrong encoding, too deep, too large."""

    code = "invalid_json"


class InvalidSpiffeId(Invalid):
    """Not a SPIFFE ID."""

    code = "invalid_spiffe_id"


class InvalidTrustDomain(InvalidSpiffeId):
    """Not a trust domain name."""

    code = "invalid_trust_domain"


class InvalidSelector(Invalid):
    """Not a ``type:value`` selector."""

    code = "invalid_selector"


class InvalidBundle(Invalid):
    """Not a SPIFFE bundle."""

    code = "invalid_bundle"


class InvalidSvid(Invalid):
    """An X.509- or JWT-SVID that does not verify."""

    code = "invalid_svid"


class InvalidToken(Invalid):
    """A user's token or a task token that does not verify."""

    code = "invalid_token"


class NotFound(BrokerError):
    """No such thing, or not yours to see: the answer is the same."""

    code = "not_found"


class Conflict(BrokerError):
    """It exists already, or its version moved on."""

    code = "conflict"


class Unavailable(BrokerError):
    """Try again: starting, overloaded, or cut off."""

    code = "unavailable"


class Misconfigured(BrokerError):
    """The operator must act; nothing starts until then."""

    code = "misconfigured"
