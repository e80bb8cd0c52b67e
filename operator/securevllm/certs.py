"""What is random: the gateway's CA and certificate, the engine's key, the first client key.

Edge: randomness and the clock. A Secret's content is made once and then only renewed: the leaf at two thirds of its
90 days, the CA long before its end. A new CA is published in every ``ca.crt`` one leaf lifetime before it signs, so
that a client that trusts the file of today trusts the certificate of tomorrow.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LEAF_LIFETIME = timedelta(days=90)
CA_LIFETIME = timedelta(days=3650)
_RENEW_AT = 2 / 3
_BACKDATE = timedelta(minutes=5)  # clocks of nodes differ

CERTIFICATE, KEY, BUNDLE = "tls.crt", "tls.key", "ca.crt"
_NEXT_CERTIFICATE, _NEXT_KEY = "next.crt", "next.key"
_PREVIOUS_CERTIFICATE = "previous.crt"

Data = Mapping[str, bytes]


@dataclass(frozen=True)
class _Pair:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def pem(self) -> tuple[bytes, bytes]:
        key = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return self.certificate.public_bytes(serialization.Encoding.PEM), key


def _load(content: Data) -> _Pair:
    """A key pair. Raises ValueError when it is none."""
    if not content.get(CERTIFICATE) or not content.get(KEY):
        raise ValueError(f"{CERTIFICATE} or {KEY} is missing")
    try:
        loaded = serialization.load_pem_private_key(content[KEY], password=None)
    except (TypeError, UnsupportedAlgorithm) as error:  # encrypted, or of a kind that is not known here
        raise ValueError(f"{KEY} cannot be read: {error}") from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{KEY} is not an EC key")  # noqa: TRY004 - the type of what a file holds is its value
    certificate = _certificate(content[CERTIFICATE])
    # A key that is not the certificate's would sign leaves that never verify, one more at every look.
    if certificate.public_key() != loaded.public_key():
        raise ValueError(f"{KEY} is not the key of {CERTIFICATE}")
    return _Pair(certificate, loaded)


def _certificate(pem: bytes) -> x509.Certificate:
    """The first certificate of a file that anybody may have written. Raises ValueError when there is none."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except x509.InvalidVersion as error:  # no ValueError
        raise ValueError(str(error)) from error


def token() -> str:
    """A key of 256 random bits, URL-safe."""
    return secrets.token_urlsafe(32)


def ca(current: Data | None, name: str, now: datetime) -> Data:
    """The CA Secret's content; the current one when nothing is due.

    Raises:
        ValueError: the current content is not a key pair.
    """
    if current is None:
        certificate, key = _new_ca(name, now).pem()
        return {CERTIFICATE: certificate, KEY: key}
    left = _load(current).certificate.not_valid_after_utc - now
    if left < LEAF_LIFETIME and _NEXT_CERTIFICATE in current:
        # Gateways serve the old leaf until kubelet brings the new one: the old CA stays in the bundle.
        return {
            CERTIFICATE: current[_NEXT_CERTIFICATE],
            KEY: current[_NEXT_KEY],
            _PREVIOUS_CERTIFICATE: current[CERTIFICATE],
        }
    if left < 2 * LEAF_LIFETIME and _NEXT_CERTIFICATE not in current:
        certificate, key = _new_ca(name, now).pem()
        return {**current, _NEXT_CERTIFICATE: certificate, _NEXT_KEY: key}
    return current


def leaf(current: Data | None, authority: Data, names: tuple[str, ...], now: datetime) -> Data:
    """The server certificate's content; the current one when it is young, signed by this CA and valid for the names.

    Raises:
        ValueError: the CA's content is not a key pair.
    """
    signer = _load(authority)
    bundle = b"".join(authority.get(name, b"") for name in (CERTIFICATE, _NEXT_CERTIFICATE, _PREVIOUS_CERTIFICATE))
    if current is not None and _usable(current, signer, names, now):
        return {**current, BUNDLE: bundle}
    certificate, key = _new_leaf(signer, names, now).pem()
    return {CERTIFICATE: certificate, KEY: key, BUNDLE: bundle}


def renewal(content: Data) -> datetime:
    """When the certificate is due."""
    certificate = _certificate(content[CERTIFICATE])
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begin + (end - begin) * _RENEW_AT


def expiry(content: Data) -> datetime:
    """When the certificate ends.

    Raises:
        ValueError: there is none.
    """
    return _certificate(content.get(CERTIFICATE, b"")).not_valid_after_utc


def _usable(current: Data, signer: _Pair, names: tuple[str, ...], now: datetime) -> bool:
    try:
        certificate = _load(current).certificate
        certificate.verify_directly_issued_by(signer.certificate)
        sans = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return now < renewal(current) and set(sans.get_values_for_type(x509.DNSName)) == set(names)
    except Exception:  # noqa: BLE001 - whatever is wrong with it, a new one is made
        return False


def _new_ca(name: str, now: datetime) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name[:40]} {secrets.token_hex(4)}")])
    builder = _builder(subject, subject, key, now, CA_LIFETIME)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    return _Pair(builder.sign(key, hashes.SHA256()), key)


def _new_leaf(signer: _Pair, names: tuple[str, ...], now: datetime) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    # A common name has at most 64 characters; clients look at the alternative names.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, min(names, key=len)[:64])])
    builder = _builder(subject, signer.certificate.subject, key, now, LEAF_LIFETIME)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False
    )
    return _Pair(builder.sign(signer.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
