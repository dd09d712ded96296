"""``broker svid mint``: an operator has an SVID signed without an entry, over the server's admin socket or its TLS port."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from broker.cli.credential_files import CredentialDirectory, NewFile, file_name
from broker.cli.options import DURATION, SPIFFE_ID, Settings, noun, option, settings
from broker.cli.output import Shape
from broker.cli.svid_texts import expiry_of, jwt_row, key_pem, pem_of, x509_row

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

SECRET: Final = 0o600
PUBLIC: Final = 0o644
SLACK: Final = 60
"""Seconds by which a life may be shorter than asked for without a word: clocks differ, and signing takes time."""

COMMAND = noun("mint", "SVIDs signed by hand, without an entry.")


def add(x509_shape: Shape, jwt_shape: Shape) -> Any:
    """Add the verbs, which show what they made in these shapes; gives the noun."""

    @COMMAND.command("x509")
    @option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, required=True, help="The identity.")
    @option("--dns", "dns_names", spire=["dns"], multiple=True, help="A DNS name on it. Repeatable.")
    @option("--ttl", spire=["ttl"], type=DURATION, default=0, help="How long it lives. Default: the server's.")
    @option("--write", spire=["write"], type=click.Path(file_okay=False, path_type=Path), required=True,
            help="Write svid.pem, key.pem (0600) and bundle.pem into this directory.")  # fmt: skip
    def x509(spiffe_id: str, dns_names: tuple[str, ...], ttl: int, write: Path) -> None:
        """Mint an X.509-SVID with a new key, which is made here, written with --write, and never printed or sent."""
        here = settings()
        if here.dry_run:
            here.shown.one(x509_shape, {"spiffe_id": spiffe_id, "dns_names": list(dns_names), "files": []})
            here.shown.talk("nothing was sent (--dry-run)")
            return
        with CredentialDirectory.opened(write) as directory:  # before anything is signed
            here.shown.one(x509_shape, _minted_x509(here, spiffe_id, dns_names, ttl, directory))
        here.shown.next(f"openssl x509 -in {write / 'svid.pem'} -noout -text")

    @COMMAND.command("jwt")
    @option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, required=True, help="The identity.")
    @option("--audience", spire=["audience"], multiple=True, required=True, help="Whom it is for. Repeatable.")
    @option("--ttl", spire=["ttl"], type=DURATION, default=0, help="How long it lives. Default: the server's.")
    @option("--write", spire=["write"], type=click.Path(dir_okay=False, path_type=Path),
            help="Write it into this file, 0600, and do not print it.")  # fmt: skip
    def jwt(spiffe_id: str, audience: tuple[str, ...], ttl: int, write: Path | None) -> None:
        """Mint a JWT-SVID."""
        here = settings()
        if here.dry_run:
            here.shown.one(jwt_shape, {"spiffe_id": spiffe_id, "audience": list(audience)})
            here.shown.talk("nothing was sent (--dry-run)")
            return
        token = _minted_jwt(here, spiffe_id, audience, ttl)
        row = jwt_row(spiffe_id, token)
        _note_cap(here, expiry_of(token), ttl)
        if write is not None:
            with CredentialDirectory.opened(write.absolute().parent) as directory:
                row["files"] = directory.write([NewFile(file_name(write.name), token.encode("ascii"), SECRET)])
            del row["svid"]
        if here.shown.format is None:
            here.shown.raw(token if write is None else f"{row['files'][0]}")
        else:
            here.shown.one(jwt_shape, row)
        here.shown.next(f"broker svid validate --audience {audience[0]} {'-' if write is None else '@' + str(write)}")

    return COMMAND


def _minted_x509(
    here: Settings, spiffe_id: str, dns_names: Sequence[str], ttl: int, directory: CredentialDirectory
) -> dict[str, Any]:
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 - slow to import

    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Bundles, Svids  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    request = _request(key, spiffe_id, dns_names)

    async def act(channel: Any) -> Any:
        svid = await Svids(channel, timeout=here.timeout).mint_x509(request, ttl=ttl)
        return svid, await Bundles(channel, timeout=here.timeout).get()

    svid, bundle = with_server(here, act)
    chain, roots = list(svid.cert_chain), [one.asn1 for one in bundle.x509_authorities]
    _require_right(chain, roots, key, spiffe_id)
    _note_cap(here, svid.expires_at, ttl)
    row = x509_row(spiffe_id, chain, pem_of(roots))
    # SPIRE's names, so that what reads its files reads ours.
    row["files"] = directory.write(
        [
            NewFile("key.pem", key_pem(key), SECRET),
            NewFile("svid.pem", row["certificates"].encode(), PUBLIC),
            NewFile("bundle.pem", row["bundle"].encode(), PUBLIC),
        ]
    )
    return row


def _request(key: "ec.EllipticCurvePrivateKey", spiffe_id: str, dns_names: Sequence[str]) -> bytes:
    from cryptography import x509  # noqa: PLC0415 - slow to import
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    from broker.errors import Invalid  # noqa: PLC0415

    try:
        names = [x509.UniformResourceIdentifier(spiffe_id), *map(x509.DNSName, dns_names)]
    except ValueError:
        raise Invalid(
            "a DNS name is not ASCII", code="invalid_dns_name", hint="write international names in their xn-- form"
        ) from None
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    signed = builder.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(key, hashes.SHA256())
    return signed.public_bytes(Encoding.DER)


def _require_right(chain: Sequence[bytes], roots: Sequence[bytes], key: Any, spiffe_id: str) -> None:
    """Look whether the answer is what was asked for, before it overwrites what worked; raises InvalidSvid."""
    from cryptography import x509  # noqa: PLC0415 - slow to import

    from broker.clock import SystemClock  # noqa: PLC0415
    from broker.errors import InvalidSvid  # noqa: PLC0415
    from broker.spiffe import Bundle, BundleSet, SpiffeId, verify_x509_svid  # noqa: PLC0415

    wanted = SpiffeId(spiffe_id)
    trusted = tuple(x509.load_der_x509_certificate(one) for one in roots)
    bundles = BundleSet.of(Bundle(wanted.trust_domain, x509_authorities=trusted))
    verified = verify_x509_svid(chain, bundles, now=SystemClock().now())
    if verified.id != wanted or x509.load_der_x509_certificate(chain[0]).public_key() != key.public_key():
        raise InvalidSvid("the server signed something else than was asked for", code="svid_mismatch")


def _minted_jwt(here: Settings, spiffe_id: str, audience: Sequence[str], ttl: int) -> str:
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Svids  # noqa: PLC0415
    from broker.spiffe import SpiffeId  # noqa: PLC0415

    wanted = SpiffeId(spiffe_id)
    minted = with_server(here, lambda channel: Svids(channel, timeout=here.timeout).mint_jwt(wanted, audience, ttl=ttl))
    token: str = minted.token
    return token


def _note_cap(here: Settings, expires_at: int, ttl: int) -> None:
    from broker.clock import SystemClock  # noqa: PLC0415 - imports nothing heavy, but the helpers need it not

    if expires_at - SystemClock().now().timestamp() < ttl - SLACK:
        here.shown.talk("note: it lives shorter than asked for; nothing outlives what signed it")
