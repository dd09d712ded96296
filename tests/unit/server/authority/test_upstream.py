from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.errors import Misconfigured, Refused
from broker.keys import MemoryKeys
from broker.keys.local import generated
from broker.server.authority import profile
from broker.server.authority import x509 as authorities
from broker.server.authority.authorities import Authorities
from broker.server.authority.forced import Forced
from broker.server.authority.journal import Journal
from broker.server.authority.rotation import Rotation, RotationRules
from broker.server.authority.upstream import DiskUpstream, SelfSigned
from broker.server.store.rows import AuthorityKind
from broker.server.store.sqlite import SqliteStore
from broker.spiffe import verify_x509_svid
from tests.unit.server.authority.world import DOMAIN, NOW, StandingClock, authority, root_der

DAY = timedelta(days=1)


def pem(key):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class Files:
    """A root of somebody else's, as files; ``other`` is another one of the same name space."""

    def __init__(self, directory, clock):
        self.directory, self.clock = directory, clock
        self.signer = generated("root")
        self.root = root_der(self.signer, clock.now(), 30 * DAY, serial=1 << 100)
        self.write("key.pem", pem(self.signer._key))
        self.put(self.root)

    def write(self, name, text, mode=0o600):
        path = self.directory / name
        path.write_bytes(text)
        path.chmod(mode)
        return path

    def put(self, *ders):
        certificates = [x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in ders]
        self.write("cert.pem", b"".join(certificates), 0o644)

    def upstream(self, bundle=None):
        here = self.directory
        return DiskUpstream(DOMAIN, self.clock, certificate=here / "cert.pem", key=here / "key.pem", bundle=bundle)

    def refused(self, bundle=None):
        with pytest.raises(Misconfigured) as caught:
            self.upstream(bundle).check()
        assert caught.value.reason == "upstream_unusable"
        assert "PRIVATE" not in caught.value.message
        return caught.value.message


@pytest.fixture
def clock():
    return StandingClock()


@pytest.fixture
def files(tmp_path, clock):
    return Files(tmp_path, clock)


@pytest.fixture
async def store(tmp_path, clock):
    async with SqliteStore.open(tmp_path / "broker.db", clock=clock) as one:
        yield one


async def test_ours_is_below_the_certificate_in_the_file(files):
    ours = generated(profile.key_identifier)
    minted = await files.upstream().mint(ours, DAY)
    certificate = x509.load_der_x509_certificate(minted.certificate)
    certificate.verify_directly_issued_by(x509.load_der_x509_certificate(files.root))
    assert minted.above == b""  # the file's certificate is the root itself
    assert [row.public for row in minted.roots] == [files.root]
    assert minted.upstream == minted.roots[0].id
    assert certificate.not_valid_after_utc == NOW + DAY


async def test_an_rsa_root_of_another_kind_will_do(files):
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "corporate")])
    builder = profile._build((name, name), key.public_key(), 5, profile.authority_validity(NOW, DAY), [])
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(x509.KeyUsage(**(profile._NO_USAGE | {"key_cert_sign": True})), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    files.put(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER))
    files.write("key.pem", pem(key))
    minted = await files.upstream().mint(generated("x"), 2 * DAY)
    assert x509.load_der_x509_certificate(minted.certificate).not_valid_after_utc == NOW + DAY


def test_files_that_cannot_be_used_are_named(files, clock):
    files.upstream().check()
    assert "cannot be read" in files.refused(files.directory / "nothing.pem")
    other = generated("other")
    stranger = files.write("roots.pem", x509.load_der_x509_certificate(root_der(other)).public_bytes(Encoding.PEM))
    assert "do not lead to a root" in files.refused(stranger)
    files.write("key.pem", pem(files.signer._key), 0o640)
    assert "others may read it" in files.refused()
    files.write("key.pem", pem(other._key))
    assert "not the upstream certificate's" in files.refused()
    files.write("key.pem", b"nonsense")
    assert "private key" in files.refused()
    files.write("key.pem", pem(files.signer._key))
    files.write("cert.pem", b"nonsense")
    assert "certificates" in files.refused()
    leaf = authority().sign(
        profile.Leaf(profile.SpiffeId.of(DOMAIN, "/x"), 9, authority().validity(NOW, DAY)), files.signer.public_key
    )
    files.put(leaf)
    files.refused()


async def test_a_root_that_allows_none_below_or_has_ended(files, clock):
    builder = profile.authority_certificate(
        DOMAIN, files.signer.public_key, 1 << 90, profile.authority_validity(NOW, DAY), path_length=0
    )
    files.put(files.signer.certify(builder).public_bytes(Encoding.DER))
    with pytest.raises(Refused) as caught:
        await files.upstream().mint(generated("x"), DAY)
    assert caught.value.reason == "path_length"
    files.put(root_der(files.signer, NOW, DAY))
    clock.advance(2 * DAY)
    with pytest.raises(Misconfigured) as ended:
        await files.upstream().mint(generated("x"), DAY)
    assert ended.value.reason == "upstream_expired"


class Process:
    def __init__(self, store, clock, upstream):
        keys = MemoryKeys()
        self.authorities = Authorities(DOMAIN, keys)
        self.journal = Journal(store, self.authorities, clock)
        rules = RotationRules(DOMAIN, (AuthorityKind.X509,), DAY, "me")
        self.rotation = Rotation(self.journal, keys, upstream, clock, rules)
        self.forced = Forced(self.journal, self.rotation, is_below=upstream.is_above)

    def svid(self, now=NOW):
        signer = self.authorities.x509()
        leaf = profile.Leaf(profile.SpiffeId.of(DOMAIN, "/x"), 9, signer.validity(now, timedelta(hours=1)))
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
        return verify_x509_svid(signer.issue(leaf, key), self.authorities.bundles, now=now)


@pytest.mark.bears("K04", "X5-05", "X5-17", "X5-22")
async def test_the_bundle_holds_the_roots_and_a_changed_root_is_followed(store, clock, files):
    before = Process(store, clock, SelfSigned(DOMAIN, clock))
    await before.rotation.start()
    own = before.authorities.bundle.x509_authorities[0]
    process = Process(store, clock, files.upstream())
    await process.rotation.start()
    root = x509.load_der_x509_certificate(files.root)
    # What the server signed itself before it had anybody above stays until it ends.
    assert set(process.authorities.bundle.x509_authorities) == {own, root}
    assert process.svid().authority == root
    state = process.forced.states(AuthorityKind.X509)
    key_id = profile.subject_key_id(root)
    assert state.active.upstream == key_id
    with pytest.raises(Refused):
        await process.forced.taint(AuthorityKind.X509, state.active.id, "op")

    # The files get a new root; the next authority is under it, and the old root can be tainted and revoked.
    files.signer = generated("next")
    files.root = root_der(files.signer, clock.now(), 30 * DAY, serial=1 << 101)
    files.write("key.pem", pem(files.signer._key))
    files.put(files.root)
    made = await process.rotation.prepare(AuthorityKind.X509, "op")
    assert len(process.authorities.bundle.x509_authorities) == 3
    await process.rotation.activate(made, "op")
    assert await process.forced.taint_upstream(key_id.upper(), "op") == key_id
    assert process.authorities.is_tainted(root)
    await process.rotation.settle()
    assert process.svid().authority == x509.load_der_x509_certificate(files.root)
    await process.forced.revoke_upstream(key_id, "op")
    assert root not in process.authorities.bundle.x509_authorities
    # It is remembered: that the files still hold it does not bring it back.
    files.put(files.root)
    await process.rotation.adopt(row for row in process.journal.published.adopted if row.id == key_id)
    assert root not in process.authorities.bundle.x509_authorities


@pytest.mark.bears("K04")
async def test_an_active_authority_under_a_tainted_root_is_replaced_by_itself(store, clock, files):
    process = Process(store, clock, files.upstream())
    await process.rotation.start()
    first = process.authorities.x509().id
    files.signer = generated("next")
    files.root = root_der(files.signer, clock.now(), 30 * DAY, serial=1 << 101)
    files.write("key.pem", pem(files.signer._key))
    files.put(files.root)
    (root,) = process.journal.published.adopted
    await process.rotation.adopt((replace(root, tainted=True),))
    await process.rotation.settle()
    assert process.authorities.x509().id != first
    assert not process.authorities.is_tainted(process.svid().authority)


def test_a_self_signed_one_is_its_own_root():
    signer = generated(profile.key_identifier)
    made = x509.load_der_x509_certificate(
        authorities.self_signed(DOMAIN, signer, 7, profile.authority_validity(NOW, DAY))
    )
    assert profile.subject_key_id(made) == signer.id == profile.key_identifier(signer.public_key)
    assert profile.issuer_key_id(made) == ""
