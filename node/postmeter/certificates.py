"""The certificates by which the nodes of a cluster know each other.

    make_authority(directory)                   ca.pem and ca.key
    make_certificate(node, directory, ...)      NODE.pem and NODE.key, signed by them
    files = CertificateFiles(cluster, node)     what the settings name, read and checked; raises ConfigError
    files.refresh()                             read again what has changed

Nodes believe whatever the cluster's CA has signed: it is to sign nodes of this cluster, and nothing else. A certificate
has the node's name among its DNS names (subjectAltName). Files may come from any other CA of that kind; chains are
PEM certificates one after the other, the node's own first.

New files count when they fit together. Until then, and if they cannot be read, the last ones go on.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from secrets import token_hex

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from postmeter import logs
from postmeter.core.identity import is_node_name
from postmeter.defaults import CERTIFICATE_BACKDATE_DAYS, CERTIFICATE_WARN_DAYS, FILE_BYTES_MAX
from postmeter.errors import ConfigError
from postmeter.settings import ClusterSettings

PEM = "write a file in PEM form: -----BEGIN ..."


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM, checked: the CA, this node's certificate chain, and its key. The chain is valid until `until`."""

    ca: bytes
    chain: bytes
    key: bytes
    until: datetime

    def trouble(self) -> str:
        """What will end soon, or has ended; "" if all is well."""
        left = self.until - datetime.now(UTC)
        if left > timedelta(days=CERTIFICATE_WARN_DAYS):
            return ""
        word = "expires" if left > timedelta(0) else "has expired"
        return f"the certificate {word} on {self.until:%Y-%m-%d %H:%M} UTC: make a new one with `postmeter certs node`"


class CertificateFiles:
    """The files of the settings. `current` are the last good ones."""

    def __init__(self, cluster: ClusterSettings, node: str) -> None:
        assert cluster.ca
        assert cluster.certificate
        assert cluster.key
        self._paths = (cluster.ca, cluster.certificate, cluster.key)
        self._node = node
        self._seen = self._marks()
        self.current = read_certificates(*self._paths, node)

    def refresh(self) -> bool:
        """Read the files again if one has changed. Whether there are new certificates; what is wrong is logged."""
        seen = self._marks()
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            found = read_certificates(*self._paths, self._node)
        except ConfigError as error:
            for problem in error.problems:
                logs.event(logging.ERROR, "certificates refused, the last good ones go on", reason=problem)
            return False
        changed, self.current = found != self.current, found
        return changed

    def _marks(self) -> list[tuple[int, int, int] | None]:
        return [_mark(path) for path in self._paths]


def _mark(path: Path) -> tuple[int, int, int] | None:
    """What is different when a file was changed."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def read_certificates(ca_path: Path, chain_path: Path, key_path: Path, node: str) -> Certificates:
    """Three files that fit together. Raises ConfigError with all that is wrong."""
    ca, chain, key = map(_read, (ca_path, chain_path, key_path))
    authorities, certificates = _parse(ca, ca_path), _parse(chain, chain_path)
    own, problems = certificates[0], []
    if not _fits(_parse_key(key, key_path), own):
        problems.append(f"{key_path}: is not the key of {chain_path}; copy both together")
    if node not in names(own):
        named = ", ".join(names(own)) or "nothing"
        problems.append(f"{chain_path}: names {named}, not {node}; make one with `postmeter certs node {node} DIR`")
    issuers = [issuer for issuer in certificates[1:] + authorities if _is_issuer(issuer, own)]
    if not issuers:
        problems.append(f"{chain_path}: is not signed by {ca_path}; take both from the same CA")
    if problems:
        raise ConfigError(problems)
    return Certificates(ca, chain, key, min(each.not_valid_after_utc for each in (own, *issuers)))


def names(certificate: x509.Certificate) -> list[str]:
    """The DNS names of a certificate."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return extension.value.get_values_for_type(x509.DNSName)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(FILE_BYTES_MAX)
    except OSError as error:
        right = "name a file that exists and that the agent may read"
        raise ConfigError([f"{path}: cannot be read ({error.strerror}); {right}"]) from None


def _parse(pem: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigError([f"{path}: has no certificate; {PEM}"]) from None


def _parse_key(pem: bytes, path: Path) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError([f"{path}: is no private key, or one with a password; {PEM}, without password"]) from None


def _fits(key: PrivateKeyTypes, certificate: x509.Certificate) -> bool:
    return key.public_key() == certificate.public_key()


def _is_issuer(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


# --- making -----------------------------------------------------------------------------------------------------------


def make_authority(directory: Path, days: int) -> tuple[Path, Path]:
    """A new CA, as ca.key and ca.pem in a directory that is made if need be. Raises ConfigError."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"Postmeter cluster {token_hex(4)}")
    builder = _builder(name, name, key, _in(days), is_authority=True)
    return _store(directory, "ca", builder.sign(key, hashes.SHA256()), key)


def make_certificate(node: str, directory: Path, addresses: Iterable[str], days: int) -> tuple[Path, Path]:
    """A node's certificate, as NODE.key and NODE.pem beside the CA, and no longer valid than that. Raises ConfigError.

    `addresses` are more names and IP addresses, for programs that check what they connect to; nodes do not need them.
    """
    if not is_node_name(node):
        raise ConfigError([f"{node!r} is no name of a node; write one in lower case, such as mx1 or mx1.example.com"])
    ca_path, key_path = directory / "ca.pem", directory / "ca.key"
    authority, authority_key = _parse(_read(ca_path), ca_path)[0], _parse_key(_read(key_path), key_path)
    if not (isinstance(authority_key, ec.EllipticCurvePrivateKey) and _fits(authority_key, authority)):
        raise ConfigError([f"{key_path}: is not the key of {ca_path}; take both from the same CA"])
    key = ec.generate_private_key(ec.SECP256R1())
    named = x509.SubjectAlternativeName([x509.DNSName(node), *map(_general_name, addresses)])
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    builder = (
        _builder(_name(node), authority.subject, key, min(_in(days), authority.not_valid_after_utc), is_authority=False)
        .add_extension(named, critical=False)
        .add_extension(usages, critical=False)
        .add_extension(issuer, critical=False)
    )
    return _store(directory, node, builder.sign(authority_key, hashes.SHA256()), key)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _in(days: int) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(address))
    except ValueError:
        pass
    if not is_node_name(address):
        raise ConfigError([f"{address!r} is no address; write a name in lower case, or an IP address"])
    return x509.DNSName(address)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, until: datetime, is_authority: bool
) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_in(-CERTIFICATE_BACKDATE_DAYS))
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _store(
    directory: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> tuple[Path, Path]:
    """Write NAME.key, for its owner only, and NAME.pem; not over anything."""
    key_path, path = directory / f"{name}.key", directory / f"{name}.pem"
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        _write(key_path, pem, 0o600)
        _write(path, certificate.public_bytes(Encoding.PEM), 0o644)
    except FileExistsError as error:
        raise ConfigError([f"{error.filename}: is there already; move it away, or choose another directory"]) from None
    except OSError as error:
        raise ConfigError([f"{directory}: cannot be written ({error.strerror}); choose another directory"]) from None
    return key_path, path


def _write(path: Path, data: bytes, mode: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
