"""Where x509-limbo, our chain layer, ``openssl verify`` and pyca do not all say the same: row by row, with the reason.

A row's four letters are those of the suite, ours, OpenSSL's (``-partial_chain``: an anchor is trusted as it is, as at our port) and
pyca's, each A (accepts) or R (refuses). The peers' letters are of the versions below; ours are exact always.
"""

from typing import Final

OPENSSL: Final = "OpenSSL 3.0"
PYCA: Final = "50"

NAMES: Final = (
    "DNS names are no identity of an SVID: nothing is matched against them, and OpenSSL was given no host either"
)
CRL: Final = "SPIFFE has no CRLs: SVIDs live for an hour, and a tainted authority leaves the bundle; none was given to the others"
AKI: Final = "identifiers of keys are a duty of issuers (RFC 5280 §4.2.1.1), path validation (§6) does not ask for them"
ANCHOR: Final = "an anchor is trusted for its name and key; what it says of its own issuer is not read"
EKU: Final = "a rule for public web sites; of SVIDs X5-16 asks that a leaf with purposes has both"
LEAF: Final = "a rule about leaves: check_leaf_usage applies it (X5-14, X5-16), the chain layer does not"
DEPTH: Final = "the depth is a constant here, not an option of the caller; OpenSSL was given none"
PYCA_SELF_ISSUED: Final = "pyca counts self-issued certificates against the path length (RFC 5280 §4.2.1.9 does not)"
PYCA_ANCHOR: Final = "pyca wants of an anchor what RFC 5280 §6.1.1 does not: it is trusted as it is"
OPENSSL_NC: Final = "OpenSSL takes the first issuer that fits and does not go back when the constraints above it refuse"
MOMENT: Final = "the last second of the validity counts (RFC 5280 §4.1.2.5); OpenSSL's ends before it"
FRACTION: Final = "notAfter ends with its second's beginning, as in Go; OpenSSL too"
MAX_CHAIN: Final = "more certificates than MAX_CHAIN"
CONSTRAINTS: Final = "constraints on this kind of name are not processed, and what is not processed refuses"
CONSTRAINTS_CRITICAL: Final = "RFC 5280 wants constraints critical; the suite has both verdicts"
UNRELATED: Final = "every certificate that a peer sends must be in order, also one that no path needs"
ONE_PURPOSE: Final = "its intermediate is for servers only, and an SVID is for both"
AUTHORITY_AS_LEAF: Final = "an authority does not authenticate (X5-08); OpenSSL does not look at what the leaf is"
POLICY: Final = "policy constraints are not processed, and what is not processed refuses"
SERIAL: Final = "RFC 5280 §4.1.2.2 wants a positive serial number of at most 20 octets"
WEAK_KEY: Final = "a key that is weak or of a kind that SVIDs do not use"
MALFORMED: Final = "malformed, or not of version 3; OpenSSL reads on"
BASIC_CONSTRAINTS: Final = "an authority says that it is one, in a critical extension (RFC 5280 §4.2.1.9)"
NO_NAME: Final = (
    "an issuer without a name, or a leaf without a subject whose names are not critical (RFC 5280 §4.1.2.6)"
)
CONSTRAINED_LEAF: Final = "constraints stand in certificates of authorities only (RFC 5280 §4.2.1.10)"
BAD_CONSTRAINTS: Final = "constraints, or names under constraints, that are malformed: what cannot be compared refuses"
NO_PURPOSE: Final = "an empty list of purposes"
WEB: Final = "a rule for public web sites"

ROWS: Final[dict[str, tuple[str, str]]] = {
    "rfc5280::san::underscore-dns": ("RAAR", NAMES),
    "rfc5280::san::ip-in-dns": ("RAAR", NAMES),
    "webpki::cn::ipv4-hex-mismatch": ("RAAA", NAMES),
    "webpki::cn::ipv4-leading-zeros-mismatch": ("RAAA", NAMES),
    "webpki::cn::ipv6-uppercase-mismatch": ("RAAA", NAMES),
    "webpki::cn::ipv6-uncompressed-mismatch": ("RAAA", NAMES),
    "webpki::cn::ipv6-non-rfc5952-mismatch": ("RAAA", NAMES),
    "webpki::cn::punycode-not-in-san": ("RAAA", NAMES),
    "webpki::cn::utf8-vs-punycode-mismatch": ("RAAA", NAMES),
    "webpki::cn::not-in-san": ("RAAA", NAMES),
    "webpki::cn::case-mismatch": ("RAAA", NAMES),
    "webpki::san::mismatch-domain-san": ("RAAR", NAMES),
    "webpki::san::mismatch-subdomain-san": ("RAAR", NAMES),
    "webpki::san::mismatch-subdomain-apex-san": ("RAAR", NAMES),
    "webpki::san::mismatch-apex-subdomain-san": ("RAAR", NAMES),
    "webpki::san::public-suffix-wildcard-san": ("RAAA", NAMES),
    "webpki::san::public-suffix-multi-label-wildcard-san": ("RAAA", NAMES),
    "webpki::san::public-suffix-private-namespace-wildcard-san": ("RAAA", NAMES),
    "webpki::san::wildcard-embedded-leftmost-san": ("RAAR", NAMES),
    "webpki::san::wildcard-not-in-leftmost-san": ("RAAR", NAMES),
    "webpki::san::wildcard-match-across-labels-san": ("RAAR", NAMES),
    "webpki::san::wildcard-embedded-ulabel-san": ("RAAR", NAMES),
    "webpki::san::unicode-emoji-san": ("RAAR", NAMES),
    "webpki::san::no-san": ("RAAR", NAMES),
    "webpki::san::san-wildcard-only": ("RAAR", NAMES),
    "webpki::san::san-wildcard-only-tld": ("RAAR", NAMES),
    "crl::revoked-certificate-with-crl": ("RAAA", CRL),
    "crl::crlnumber-missing": ("RAAA", CRL),
    "crl::crlnumber-critical": ("RAAA", CRL),
    "crl::issuer-missing-crlsign": ("RAAA", CRL),
    "rfc5280::aki::leaf-missing-aki": ("RAAR", AKI),
    "rfc5280::aki::intermediate-missing-aki": ("RAAA", AKI),
    "rfc5280::ski::intermediate-missing-ski": ("RAAA", AKI),
    "rfc5280::aki::cross-signed-root-missing-aki": ("RAAA", ANCHOR),
    "rfc5280::ski::root-missing-ski": ("RAAA", ANCHOR),
    "webpki::aki::root-with-aki-missing-keyidentifier": ("RAAR", ANCHOR),
    "webpki::aki::root-with-aki-authoritycertissuer": ("RRAA", ANCHOR),
    "webpki::aki::root-with-aki-authoritycertserialnumber": ("RRAA", ANCHOR),
    "webpki::aki::root-with-aki-all-fields": ("RAAA", ANCHOR),
    "webpki::aki::root-with-aki-ski-mismatch": ("RAAA", ANCHOR),
    "webpki::eku::ee-anyeku": ("RAAA", EKU),
    "webpki::eku::ee-critical-eku": ("RAAR", EKU),
    "webpki::eku::ee-without-eku": ("RAAA", EKU),
    "rfc5280::eku::ee-wrong-eku": ("RAAR", LEAF),
    "rfc5280::leaf-ku-keycertsign": ("RAAR", LEAF),
    "pathlen::max-chain-depth-0-exhausted": ("RAAR", DEPTH),
    "pathlen::max-chain-depth-1-exhausted": ("RAAR", DEPTH),
    "pathlen::self-issued-certs-pathlen": ("AAAR", PYCA_SELF_ISSUED),
    "pathlen::max-chain-depth-1-self-issued": ("AAAR", PYCA_SELF_ISSUED),
    "crl::issuer-no-keyusage-extension": ("AAAR", PYCA_ANCHOR),
    "rfc5280::nc::nc-forbids-alternate-chain-ica": ("AARA", OPENSSL_NC),
    "rfc5280::nc::nc-forbids-same-chain-ica": ("AARA", OPENSSL_NC),
    "rfc5280::validity::notafter-exact": ("AARA", MOMENT),
    "rfc5280::validity::notafter-fractional": ("ARRA", FRACTION),
    "cve::cve-2024-0567": ("ARAA", MAX_CHAIN),
    "rfc5280::nc::permitted-ipv4-match": ("ARAA", CONSTRAINTS),
    "rfc5280::nc::permitted-ipv6-match": ("ARAA", CONSTRAINTS),
    "rfc5280::nc::permitted-dn-match": ("ARAR", CONSTRAINTS),
    "rfc5280::nc::nc-permits-email-exact": ("ARAA", CONSTRAINTS),
    "rfc5280::nc::nc-permits-email-domain": ("ARAA", CONSTRAINTS),
    "rfc5280::nc::nc-permits-email-literal-asterisk-exact-match": ("ARAA", CONSTRAINTS),
    "rfc5280::nc::nc-permits-email-literal-double-asterisk": ("ARAA", CONSTRAINTS),
    "rfc5280::nc::nc-permits-email-literal-mid-asterisk": ("ARAA", CONSTRAINTS),
    "webpki::nc::permitted-dns-match-noncritical": ("ARAA", CONSTRAINTS_CRITICAL),
    "rfc5280::nc::permitted-dns-match-noncritical": ("RRAA", CONSTRAINTS_CRITICAL),
    "rfc5280::unknown-critical-extension-unrelated-intermediate": ("ARAA", UNRELATED),
    "online::microsoft.com": ("ARAA", ONE_PURPOSE),
    "online::bing.com": ("ARAA", ONE_PURPOSE),
    "pathlen::validation-ignores-pathlen-in-leaf": ("ARAR", AUTHORITY_AS_LEAF),
    "rfc5280::ca-as-leaf": ("ARAR", AUTHORITY_AS_LEAF),
    "rfc5280::ca-as-leaf-wrong-san": ("RRAR", AUTHORITY_AS_LEAF),
    "webpki::ee-basicconstraints-ca": ("RRAR", AUTHORITY_AS_LEAF),
    "webpki::ca-as-leaf": ("RRAR", AUTHORITY_AS_LEAF),
    "rfc5280::pc::ica-noncritical-pc": ("RRAA", POLICY),
    "rfc5280::serial::too-long": ("RRAR", SERIAL),
    "rfc5280::serial::zero": ("RRAA", SERIAL),
    "rfc5280::serial::negative": ("RRAR", SERIAL),
    "webpki::forbidden-p192-root": ("RRAR", WEAK_KEY),
    "webpki::forbidden-p192-leaf": ("RRAA", WEAK_KEY),
    "webpki::forbidden-dsa-root": ("RRAR", WEAK_KEY),
    "webpki::forbidden-dsa-leaf": ("RRAA", WEAK_KEY),
    "webpki::forbidden-weak-rsa-key-in-root": ("RRAR", WEAK_KEY),
    "webpki::forbidden-weak-rsa-in-leaf": ("RRAA", WEAK_KEY),
    "webpki::forbidden-rsa-not-divisible-by-8-in-root": ("RRAA", WEAK_KEY),
    "webpki::forbidden-rsa-key-not-divisible-by-8-in-leaf": ("RRAA", WEAK_KEY),
    "webpki::malformed-aia": ("RRAR", MALFORMED),
    "webpki::v1-cert": ("RRAR", MALFORMED),
    "rfc5280::root-missing-basic-constraints": ("RRAR", BASIC_CONSTRAINTS),
    "rfc5280::root-non-critical-basic-constraints": ("RRAR", BASIC_CONSTRAINTS),
    "rfc5280::san::noncritical-with-empty-subject": ("RRAR", NO_NAME),
    "rfc5280::ca-empty-subject": ("RRAR", NO_NAME),
    "rfc5280::nc::not-allowed-in-ee-noncritical": ("RRAR", CONSTRAINED_LEAF),
    "rfc5280::nc::not-allowed-in-ee-critical": ("RRAR", CONSTRAINED_LEAF),
    "cve::cve-2025-61727": ("RRAR", BAD_CONSTRAINTS),
    "rfc5280::nc::invalid-dnsname-leading-period": ("RRAR", BAD_CONSTRAINTS),
    "rfc5280::nc::nc-permits-invalid-dns-san": ("RRAR", BAD_CONSTRAINTS),
    "rfc5280::nc::nc-permits-invalid-email-san": ("RRAR", BAD_CONSTRAINTS),
    "rfc5280::nc::nc-forbids-dnsname-wildcard-san": ("RRAR", BAD_CONSTRAINTS),
    "webpki::nc::intermediate-permitted-excluded-subtrees-both-null": ("RRAR", BAD_CONSTRAINTS),
    "webpki::nc::intermediate-permitted-excluded-subtrees-both-empty-sequences": ("RRAR", BAD_CONSTRAINTS),
    "rfc5280::eku::ee-eku-empty": ("RRAR", NO_PURPOSE),
    "webpki::eku::root-has-eku": ("RAAA", WEB),
    "webpki::san::san-critical-with-nonempty-subject": ("RAAR", WEB),
}
