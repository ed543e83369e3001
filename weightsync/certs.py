"""A job's own certificate authority: what `weightsync certs` makes, and how certificates are read.

One folder, mode 0700, with five files of mode 0600:

    ca.key      signs server certificates; no process of the job needs it
    ca.pem      certificate of the CA: every host
    token       proves that a process belongs to the job: every host
    server.pem  the coordinator's certificate, valid for the hosts named in it
    server.key  its private key: the coordinator's host only

Keys, signatures and random numbers come from `cryptography` and `secrets`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from weightsync.errors import ConfigError
from weightsync.settings import CA_NAME, CERT_NAME, KEY_NAME, TOKEN_NAME

__all__ = [
    "CA_KEY_NAME",
    "DEFAULT_DAYS",
    "Certificate",
    "Certs",
    "make_certs",
    "public_key_of",
    "read_certificate",
    "renew_certs",
]

CA_KEY_NAME: Final = "ca.key"
DEFAULT_DAYS: Final = 365
# Outlives its server certificates, so that renewing one of them changes nothing for members.
_CA_DAYS: Final = 3650
# Hosts whose clocks lag behind accept a fresh certificate too.
_BACKDATED: Final = dt.timedelta(hours=1)
_TOKEN_BYTES: Final = 32
# Processes beside the coordinator reach it under these.
_LOOPBACK_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
_FILES: Final = {
    CA_KEY_NAME: "secret; signs further certificates, no process of a job needs it",
    CA_NAME: "every host: members verify the coordinator with it",
    TOKEN_NAME: "secret; every host: who has it may join",
    CERT_NAME: "the coordinator's host only",
    KEY_NAME: "secret; the coordinator's host only",
}
_DNS_LABEL: Final = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
_DNS_NAME: Final = re.compile(rf"(?:\*\.)?{_DNS_LABEL}(?:\.{_DNS_LABEL})*", re.IGNORECASE)


@dataclass(frozen=True)
class Certificate:
    """What matters of a certificate.

    Args:
        hosts: Names and addresses it is valid for, lower case.
        not_before: Start of its validity, UTC.
        not_after: End of its validity, UTC.
        fingerprint: SHA-256 of the certificate in hexadecimal.
        public_key: DER of its public key, to compare with a private one.
    """

    hosts: tuple[str, ...]
    not_before: dt.datetime
    not_after: dt.datetime
    fingerprint: str
    public_key: bytes

    @property
    def public_host(self) -> str | None:
        """The first name or address that other hosts can connect to, as URLs write it."""
        for host in self.hosts:
            if host.startswith("*") or host == "localhost":
                continue
            try:
                address = ipaddress.ip_address(host)
            except ValueError:
                return host
            if not address.is_loopback:
                return f"[{address}]" if address.version == 6 else host
        return None

    def names(self, host: str) -> bool:
        """Whether a client that connects to `host` accepts the certificate."""
        host = host.lower()
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(host)) in self.hosts
        return host in self.hosts or f"*.{host.partition('.')[2]}" in self.hosts


@dataclass(frozen=True)
class Certs:
    """A folder that `make_certs` or `renew_certs` wrote.

    Args:
        folder: Where the files are.
        server: The server's certificate.
        ca: The CA's certificate.
    """

    folder: Path
    server: Certificate
    ca: Certificate

    @property
    def names(self) -> dict[str, str]:
        """The files and who needs them."""
        return dict(_FILES)


def make_certs(
    folder: str | Path,
    hosts: Sequence[str] = (),
    *,
    days: int | None = None,
    force: bool = False,
    now: dt.datetime | None = None,
) -> Certs:
    """Make a CA, a server certificate and a token.

    Args:
        folder: Made with mode 0700 if it is not there.
        hosts: DNS names and IP addresses under which members reach the coordinator; none: the name
            of this host. Loopback is always among them.
        days: For how long the server certificate is valid; None: 365.
        force: Replace files that are there; every member then needs the new ca.pem and token.
        now: Start of validity; None: now.

    Raises:
        ConfigError: A file is there already, others may enter the folder, it cannot be written,
            or a host is no name.
    """
    folder = Path(folder)
    names = _checked_hosts(hosts if hosts else [socket.gethostname()])
    began = _moment(now)
    end = _end(began, days, began + dt.timedelta(days=_CA_DAYS))
    _take_folder(folder)
    taken = [name for name in _FILES if os.path.lexists(folder / name)]
    if taken and not force:
        raise ConfigError(
            f"{folder} holds {', '.join(taken)} already; choose another --dir, renew the server "
            "certificate with --renew, or replace everything with --force (every member then "
            f"needs the new {CA_NAME} and {TOKEN_NAME})"
        )
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _ca_certificate(ca_key, began)
    key, server = _server_certificate(ca, ca_key, names, began, end)
    for name, content in (
        (CA_KEY_NAME, _private_pem(ca_key)),
        (CA_NAME, ca.public_bytes(serialization.Encoding.PEM)),
        (TOKEN_NAME, secrets.token_urlsafe(_TOKEN_BYTES).encode("ascii") + b"\n"),
        (KEY_NAME, _private_pem(key)),
        (CERT_NAME, server.public_bytes(serialization.Encoding.PEM)),
    ):
        _write(folder / name, content, replace=force)
    return Certs(folder, _summary(server), _summary(ca))


def renew_certs(
    folder: str | Path,
    hosts: Sequence[str] = (),
    *,
    days: int | None = None,
    now: dt.datetime | None = None,
) -> Certs:
    """Make a new server certificate of the same CA; members keep their ca.pem and token.

    Args:
        folder: Of an earlier `make_certs`.
        hosts: As `make_certs`; none: those of the present certificate.
        days: For how long it is valid, at most as long as the CA; None: 365, or what is left.
        now: Start of validity; None: now.

    Raises:
        ConfigError: The folder holds no CA, the CA ended, or a file cannot be read or written.
    """
    folder = Path(folder)
    ca = _load_certificate(folder / CA_NAME)
    ca_key = _load_private(folder / CA_KEY_NAME)
    began = _moment(now)
    if began >= ca.not_valid_after_utc:
        raise ConfigError(
            f"the CA in {folder} ended on {ca.not_valid_after_utc:%Y-%m-%d}; make a new one with "
            f"--force and copy {CA_NAME} and {TOKEN_NAME} to every host"
        )
    names = _checked_hosts(hosts) if hosts else read_certificate(folder / CERT_NAME).hosts
    end = _end(began, days, ca.not_valid_after_utc)
    key, server = _server_certificate(ca, ca_key, names, began, end)
    _take_folder(folder)
    _write(folder / KEY_NAME, _private_pem(key), replace=True)
    _write(folder / CERT_NAME, server.public_bytes(serialization.Encoding.PEM), replace=True)
    return Certs(folder, _summary(server), _summary(ca))


def read_certificate(path: str | Path) -> Certificate:
    """What a certificate file says; of a chain the first one.

    Raises:
        ConfigError: The file cannot be read or holds no certificate.
    """
    return _summary(_load_certificate(Path(path)))


def public_key_of(private_pem: bytes) -> bytes:
    """DER of the public half of a private key.

    Raises:
        ValueError, TypeError: It is no private key, or one with a pass phrase.
    """
    key = serialization.load_pem_private_key(private_pem, password=None)
    return _public_der(key.public_key())


# ---- certificates ----


def _ca_certificate(key: ec.EllipticCurvePrivateKey, began: dt.datetime) -> x509.Certificate:
    # The number in the name keeps two jobs' CAs apart wherever names are compared or shown.
    name = _name(f"weightsync job CA {secrets.token_hex(4)}")
    usage = _usage(digital_signature=False, key_cert_sign=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(began - _BACKDATED)
        .not_valid_after(began + dt.timedelta(days=_CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


def _server_certificate(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    began: dt.datetime,
    end: dt.datetime,
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name("weightsync coordinator"))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(began - _BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True, key_cert_sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(h) for h in hosts]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    return key, certificate


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, digital_signature: bool, key_cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=key_cert_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _checked_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """Lower case, addresses in their shortest form, loopback added, no doubles."""
    found: dict[str, None] = {}
    for host in (*hosts, *_LOOPBACK_HOSTS):
        try:
            address = ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            if not _DNS_NAME.fullmatch(host) or len(host) > 253 or host.split(".")[-1].isdecimal():
                raise ConfigError(
                    f"host {host!r}: give a DNS name or an IP address, without port or scheme"
                ) from None
            found[host.lower()] = None
        else:
            if address.is_unspecified:
                raise ConfigError(
                    f"host {host}: nobody connects to it; name the host as members reach it"
                )
            found[str(address)] = None
    return tuple(found)


def _moment(now: dt.datetime | None) -> dt.datetime:
    # Certificates have whole seconds.
    return (dt.datetime.now(dt.UTC) if now is None else now).replace(microsecond=0)


def _end(began: dt.datetime, days: int | None, ca_end: dt.datetime) -> dt.datetime:
    if days is None:
        return min(began + dt.timedelta(days=DEFAULT_DAYS), ca_end)
    if days < 1:
        raise ConfigError(f"days={days}: at least 1")
    left = (ca_end - began).days
    if days > left:
        raise ConfigError(
            f"days={days}: the CA ends in {left} days; a certificate cannot outlast it"
        )
    return began + dt.timedelta(days=days)


def _summary(certificate: x509.Certificate) -> Certificate:
    hosts: tuple[str, ...] = ()
    with contextlib.suppress(x509.ExtensionNotFound):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = tuple(
            str(name.value).lower()
            for name in names
            if isinstance(name, x509.DNSName | x509.IPAddress)
        )
    return Certificate(
        hosts=hosts,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        public_key=_public_der(certificate.public_key()),
    )


def _public_der(key: object) -> bytes:
    return key.public_bytes(  # type: ignore[attr-defined, no-any-return]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


# ---- files ----


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except OSError as error:
        raise ConfigError(
            f"certificate {path}: {error.strerror}; `weightsync certs` makes one"
        ) from error
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise ConfigError(f"{path} holds no certificate (PEM): {error}") from error


def _load_private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(f"private key {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} holds no private key of a CA that `weightsync certs` made")
    return key


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _take_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"folder {folder}: {error.strerror}") from error
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"folder {folder}: others may enter it (mode {found.st_mode & 0o777:04o}), and it is "
            f"to hold private keys; chmod 700 {folder}, or choose another --dir"
        )


def _write(path: Path, content: bytes, *, replace: bool) -> None:
    """Write a file that only its owner may read; never through a link, never half of it."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}") if replace else path
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(scratch, flags, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                os.fchmod(fd, 0o600)  # whatever the umask
                file.write(content)
                file.flush()
                os.fsync(fd)
            if replace:
                os.replace(scratch, path)  # noqa: PTH105 - keeps both calls of one kind
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
