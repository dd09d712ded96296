"""Envoy's secrets, made of what a workload holds: a certificate with its key, or what peers are judged by.

Names and forms are those of SPIRE's agent, so that an Envoy that was set up for it finds the same. Pure: no calls, no clock.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker._proto.envoy.config.core.v3 import base_pb2, extension_pb2
from broker._proto.envoy.extensions.transport_sockets.tls.v3 import secret_pb2, tls_spiffe_validator_config_pb2
from broker._proto.google.protobuf import any_pb2
from broker.agent.holdings import X509Holding
from broker.errors import Invalid, Unavailable
from broker.spiffe import Bundle, SpiffeId, TrustDomain

VALIDATOR: Final = "envoy.tls.cert_validator.spiffe"
DISABLE: Final = "disable_spiffe_cert_validation"  # in the node's metadata, over the setting
_OLDEST: Final = (1, 18)  # the first Envoy that has the validator
_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "false", "FALSE", "False"})


@dataclass(frozen=True, slots=True)
class SecretNames:
    """What Envoy may ask for beside SPIFFE IDs: the first SVID, the own bundle, and every bundle at once."""

    svid: str = "default"
    bundle: str = "ROOTCA"
    all_bundles: str = "ALL"
    is_validator_disabled: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """What a workload holds now: its identities in their order, its own bundle, those that it federates with."""

    identities: Sequence[tuple[SpiffeId, X509Holding]]
    own: Bundle
    federated: Mapping[TrustDomain, Bundle]  # those with X.509 authorities

    @property
    def bundles(self) -> dict[str, Bundle]:
        """Every bundle, by the SPIFFE ID of its trust domain."""
        return {str(one.trust_domain.id): one for one in (self.own, *self.federated.values())}


class NoValidatorError(Unavailable):
    """An Envoy without the validator asks for what only the validator can read."""

    code = "envoy_too_old"


def uses_validator(node: base_pb2.Node, names: SecretNames) -> bool:
    """Say whether this Envoy judges peers by trust domain, and not by one heap of authorities."""
    value = node.metadata.fields.get(DISABLE)
    is_disabled = names.is_validator_disabled
    if value is not None and value.WhichOneof("kind") == "bool_value":
        is_disabled = value.bool_value
    elif value is not None and value.WhichOneof("kind") == "string_value" and value.string_value in _TRUE | _FALSE:
        is_disabled = value.string_value in _TRUE
    if is_disabled or not node.HasField("user_agent_build_version"):
        return not is_disabled  # as in SPIRE: who does not say its version is new
    version = node.user_agent_build_version.version
    return (version.major_number, version.minor_number) >= _OLDEST


def needs_svids(requested: Iterable[str], names: SecretNames, bundles: Iterable[str]) -> bool:
    """Say whether any of these names may be an SVID's; no name asks for everything."""
    asked = set(requested)
    return not asked or bool(asked - {names.bundle, names.all_bundles, *bundles})


def secrets(
    requested: Iterable[str], held: Held, names: SecretNames, *, with_validator: bool
) -> tuple[any_pb2.Any, ...]:
    """Give the secrets of these names, or all where none is named.

    Raises Invalid (``not_authorized``) where one is not this workload's, NoValidatorError for all bundles without the validator.
    """
    left = {name for name in requested if name}
    made: list[secret_pb2.Secret] = []
    every = not left
    bundles = held.bundles
    for name, bundle in bundles.items():
        if every or name in left:
            made.append(_validation(name, [bundle], with_validator=with_validator))
    if names.bundle in left:
        made.append(_validation(names.bundle, [held.own], with_validator=with_validator))
    if names.all_bundles in left:
        if not with_validator:
            raise NoValidatorError('unable to use "SPIFFE validator" on Envoy below 1.17')
        ordered = sorted(bundles.values(), key=lambda one: str(one.trust_domain))
        made.append(_validation(names.all_bundles, ordered, with_validator=True))
    for number, (spiffe_id, holding) in enumerate(held.identities):
        if every or str(spiffe_id) in left:
            made.append(_certificate(str(spiffe_id), holding))
        if number == 0 and names.svid in left:
            made.append(_certificate(names.svid, holding))
    left -= {one.name for one in made}
    if left:
        listed = " ".join(map(json.dumps, sorted(left)))
        raise Invalid(f"workload is not authorized for the requested identities [{listed}]", code="not_authorized")
    return tuple(map(_packed, made))


def _certificate(name: str, holding: X509Holding) -> secret_pb2.Secret:
    chain = "".join(map(_pem, holding.svid.chain))
    key = holding.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return secret_pb2.Secret(
        name=name,
        tls_certificate=secret_pb2.TlsCertificate(
            certificate_chain=base_pb2.DataSource(inline_bytes=chain.encode()),
            private_key=base_pb2.DataSource(inline_bytes=key),
        ),
    )


def _validation(name: str, bundles: Sequence[Bundle], *, with_validator: bool) -> secret_pb2.Secret:
    if not with_validator:
        (bundle,) = bundles
        context = secret_pb2.CertificateValidationContext(trusted_ca=_authorities(bundle))
        return secret_pb2.Secret(name=name, validation_context=context)
    domain = tls_spiffe_validator_config_pb2.SPIFFECertValidatorConfig.TrustDomain
    config = tls_spiffe_validator_config_pb2.SPIFFECertValidatorConfig(
        trust_domains=[domain(name=str(one.trust_domain), trust_bundle=_authorities(one)) for one in bundles]
    )
    validator = extension_pb2.TypedExtensionConfig(name=VALIDATOR)
    validator.typed_config.Pack(config)
    context = secret_pb2.CertificateValidationContext(custom_validator_config=validator)
    return secret_pb2.Secret(name=name, validation_context=context)


def _authorities(bundle: Bundle) -> base_pb2.DataSource:
    return base_pb2.DataSource(inline_bytes="".join(map(_pem, bundle.x509_authorities)).encode())


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def _packed(secret: secret_pb2.Secret) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(secret, deterministic=True)
    return packed
