"""Authorities that issue, revoke and renew certificates of any kind, made with `cryptography`."""

from __future__ import annotations

import datetime
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .certs import Pki

DAY = datetime.timedelta(days=1)
_serial = itertools.count(1000)


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def put(path: Path, content: bytes | str | Path) -> None:
    """Replaces a file in one step, as certbot and Kubernetes do."""
    if isinstance(content, Path):
        content = content.read_bytes()
    fresh = path.with_name(f".{path.name}.{next(_serial)}")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(fresh, path)


@dataclass
class Leaf:
    cert: Path
    key: Path
    x509: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.cert.read_bytes()

    @property
    def not_after(self) -> float:
        return self.x509.not_valid_after_utc.timestamp()


class Authority:
    """A certificate authority in a directory of its own."""

    def __init__(self, directory: Path, name: str = "ca"):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.name = directory, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Test CA {name}")])
        self.cert = (
            self._builder(subject, subject, self.key, -1, 30)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.ca = directory / f"{name}-ca.pem"
        self.ca.write_bytes(self.cert.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, cn: str | None = None, dns=(), uris=(), client: bool = False, start: float = -1, days: float = 30, kind: str = "ec") -> Leaf:
        """A certificate valid from `start` to `days`, both counted in days from now."""
        key = ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else rsa.generate_private_key(65537, 2048)
        common = name if cn is None else cn
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else [])
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        builder = (
            self._builder(subject, self.cert.subject, key, start, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        names = [x509.DNSName(one) for one in dns] + [x509.UniformResourceIdentifier(one) for one in uris]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        cert = builder.sign(self.key, hashes.SHA256())
        files = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        put(files[0], cert.public_bytes(serialization.Encoding.PEM))
        put(files[1], key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        return Leaf(*files, cert)

    def server(self, name: str, **kwargs) -> Leaf:
        return self.issue(name, **{"dns": ("localhost",)} | kwargs)

    def client(self, name: str, **kwargs) -> Leaf:
        return self.issue(name, client=True, **kwargs)

    def crl(self, *revoked: Leaf, start: float = -1, days: float = 30) -> bytes:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.cert.subject)
            .last_update(now() + start * DAY)
            .next_update(now() + days * DAY)
            .add_extension(x509.CRLNumber(next(_serial)), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        for leaf in revoked:
            one = x509.RevokedCertificateBuilder().serial_number(leaf.x509.serial_number).revocation_date(now() - DAY / 24)
            builder = builder.add_revoked_certificate(one.build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def pki(self, leaf: Leaf) -> Pki:
        return Pki(self.ca, leaf.cert, leaf.key)

    def _builder(self, subject, issuer, key, start: float, days: float):
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() + start * DAY)
            .not_valid_after(now() + days * DAY)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
