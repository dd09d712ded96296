"""From the settings of federation to values: the relationships that they name, and the bundles to begin with."""

from pathlib import Path
from typing import Final

from cryptography import x509

from broker.clock import Clock
from broker.errors import BrokerError, Invalid, Misconfigured
from broker.server.identity.bundles import put_bundle
from broker.server.settings import FederatesWithSettings, ServerSettings
from broker.server.store.bundle_rows import PublishedBundle
from broker.server.store.ports import Store, Writer
from broker.spiffe import Bundle, TrustDomain
from broker.spiffe.federation import Relationship

HINT: Final = "correct [[server.federation.federates_with]]"


def configured_relationships(settings: ServerSettings) -> tuple[Relationship, ...]:
    """Give the relationships of the settings; raises Misconfigured for one that cannot be, or that is there twice."""
    found: dict[TrustDomain, Relationship] = {}
    for one in settings.federation.federates_with:
        name = one.trust_domain
        if name == settings.trust_domain or name in found:
            reason = "is this server's own" if name == settings.trust_domain else "is there twice"
            raise Misconfigured(f"federates_with: {name} {reason}", code="federation_settings", hint=HINT)
        try:
            found[name] = Relationship(
                name, one.bundle_endpoint_url, one.bundle_endpoint_profile, one.endpoint_spiffe_id
            )
        except Invalid as error:
            raise Misconfigured(
                f"federates_with {name}: {error.message}", code="federation_settings", hint=HINT
            ) from None
    return tuple(found.values())


async def bootstrap(settings: ServerSettings, store: Store, clock: Clock) -> None:
    """Store the bundles to begin with, where there is none yet (SPIFFE Federation §5.2.2); raises Misconfigured."""
    first = [
        _read_bundle(one, one.trust_domain_bundle_path)
        for one in settings.federation.federates_with
        if one.trust_domain_bundle_path is not None
    ]
    if not first:
        return
    now = clock.now()

    def act(writer: Writer) -> None:
        for bundle in first:
            # One that was fetched since is newer, whatever the file says.
            if writer.federated_bundle(bundle.trust_domain) is None:
                put_bundle(writer, bundle, "server", now)

    await store.write(act)


def _read_bundle(settings: FederatesWithSettings, path: Path) -> PublishedBundle:
    what = f"trust_domain_bundle_path of {settings.trust_domain}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Misconfigured(f"{what}: {path} cannot be read: {error.strerror}", code="federation_settings") from error
    try:
        if content.lstrip().startswith(b"{"):
            bundle = Bundle.parse(settings.trust_domain, content)
        else:
            bundle = Bundle(settings.trust_domain, tuple(x509.load_pem_x509_certificates(content)))
        return PublishedBundle.of(bundle)
    except (BrokerError, ValueError) as error:
        raise Misconfigured(f"{what}: {path} is neither PEM nor a SPIFFE bundle", code="federation_settings") from error
