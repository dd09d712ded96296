"""The vocabulary of SPIFFE: parse it, verify it, never fetch it. Pure rules over bytes, with ``now`` as an argument."""

from broker.spiffe.bundles import Bundle, BundleSet
from broker.spiffe.ids import SpiffeId, TrustDomain
from broker.spiffe.jwtsvid import JwtSvid, verify_jwt_svid
from broker.spiffe.selectors import Selector
from broker.spiffe.x509svid import X509Svid, verify_x509_svid

__all__ = [
    "Bundle",
    "BundleSet",
    "JwtSvid",
    "Selector",
    "SpiffeId",
    "TrustDomain",
    "X509Svid",
    "verify_jwt_svid",
    "verify_x509_svid",
]
