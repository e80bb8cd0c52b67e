"""Certificates over fifteen years, looked at by a clock that the test owns."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from securevllm import certs
from securevllm.certs import BUNDLE, CERTIFICATE, KEY, LEAF_LIFETIME, Data

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
NAMES = ("llama-gateway.apps.svc.cluster.local", "llama-gateway")
DAY = timedelta(days=1)


def leaf_of(content: Data) -> x509.Certificate:
    return x509.load_pem_x509_certificate(content[CERTIFICATE])


def verifies(certificate: x509.Certificate, bundle: bytes, now: datetime) -> bool:
    """Whether a client that trusts the bundle takes the server's certificate (RFC 5280 and the web profile)."""
    store = Store(x509.load_pem_x509_certificates(bundle))
    verifier = PolicyBuilder().store(store).time(now).build_server_verifier(x509.DNSName(NAMES[0]))
    try:
        verifier.verify(certificate, [])
    except VerificationError:
        return False
    return True


def test_a_new_leaf_is_a_server_certificate_for_the_names() -> None:
    content = certs.leaf(None, certs.ca(None, "llama-gateway-ca", BEGIN), NAMES, BEGIN)
    certificate = leaf_of(content)
    sans = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert tuple(sans.get_values_for_type(x509.DNSName)) == NAMES
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert certificate.not_valid_after_utc == BEGIN + LEAF_LIFETIME
    assert certificate.not_valid_before_utc < BEGIN
    assert verifies(certificate, content[BUNDLE], BEGIN)


def test_the_end_of_a_certificate_is_told_and_what_is_none_has_none() -> None:
    content = certs.leaf(None, certs.ca(None, "ca", BEGIN), NAMES, BEGIN)
    assert certs.expiry({CERTIFICATE: content[CERTIFICATE]}) == BEGIN + LEAF_LIFETIME
    der = leaf_of(content).public_bytes(serialization.Encoding.DER)
    version = bytes.fromhex("a003020102")  # v3, in front of the serial number
    assert der.count(version) == 1
    body = base64.encodebytes(der.replace(version, version[:-1] + b"\x09"))
    unknown = b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"
    for wrong in ({}, {CERTIFICATE: b""}, {CERTIFICATE: b"no certificate"}, {CERTIFICATE: unknown}):
        with pytest.raises(ValueError, match=r"."):
            certs.expiry(wrong)


def test_a_leaf_is_kept_until_two_thirds_of_its_life() -> None:
    authority = certs.ca(None, "ca", BEGIN)
    content = certs.leaf(None, authority, NAMES, BEGIN)
    due = certs.renewal(content)
    assert BEGIN + 59 * DAY < due < BEGIN + 61 * DAY
    assert certs.leaf(content, authority, NAMES, due - timedelta(seconds=1)) == content
    assert certs.leaf(content, authority, NAMES, due)[CERTIFICATE] != content[CERTIFICATE]


@pytest.mark.parametrize("change", ["names", "certificate", "key", "nothing there"])
def test_a_leaf_that_is_not_the_right_one_is_made_again(change: str) -> None:
    authority = certs.ca(None, "ca", BEGIN)
    content = certs.leaf(None, authority, NAMES, BEGIN)
    other = certs.leaf(None, authority, NAMES, BEGIN)
    broken: dict[str, Data] = {
        "names": content,
        "certificate": {**content, CERTIFICATE: b"no PEM"},
        "key": {**content, KEY: other[KEY]},
        "nothing there": {},
    }
    names = (*NAMES, "llm.example.com") if change == "names" else NAMES
    again = certs.leaf(broken[change], authority, names, BEGIN)
    assert again[CERTIFICATE] not in {content[CERTIFICATE], b"no PEM"}
    assert verifies(leaf_of(again), again[BUNDLE], BEGIN)
    assert certs.leaf(again, authority, names, BEGIN) == again


def test_a_leaf_of_another_ca_is_made_again() -> None:
    content = certs.leaf(None, certs.ca(None, "ca", BEGIN), NAMES, BEGIN)
    other = certs.ca(None, "ca", BEGIN)
    again = certs.leaf(content, other, NAMES, BEGIN)
    assert verifies(leaf_of(again), other[CERTIFICATE], BEGIN)


def test_fifteen_years_of_rotations() -> None:
    """Whoever trusts the file of one leaf lifetime ago trusts the certificate of now, and of the next minutes."""
    authority = certs.ca(None, "llama-gateway-ca", BEGIN)
    content = certs.leaf(None, authority, NAMES, BEGIN)
    published: list[tuple[datetime, bytes]] = [(BEGIN, content[BUNDLE])]
    signers, now = {authority[CERTIFICATE]}, BEGIN
    while now < BEGIN + 15 * 365 * DAY:
        now += 10 * DAY
        before = content
        authority = certs.ca(authority, "llama-gateway-ca", now)
        content = certs.leaf(content, authority, NAMES, now)
        assert certs.ca(authority, "llama-gateway-ca", now) == authority
        assert certs.leaf(content, authority, NAMES, now) == content
        signers.add(authority[CERTIFICATE])
        published.append((now, content[BUNDLE]))
        while published[1][0] <= now - LEAF_LIFETIME:
            published.pop(0)
        assert verifies(leaf_of(content), published[0][1], now), now
        # Kubelet takes its time: a gateway still has the leaf of before while clients read the new bundle.
        assert verifies(leaf_of(before), content[BUNDLE], now), now
        assert (
            leaf_of(content).not_valid_after_utc
            <= x509.load_pem_x509_certificate(authority[CERTIFICATE]).not_valid_after_utc
        )
    assert len(signers) == 2


def test_an_operator_that_was_down_for_years_makes_a_ca_that_works() -> None:
    authority = certs.ca(None, "ca", BEGIN)
    late = BEGIN + 12 * 365 * DAY
    for _ in range(2):
        authority = certs.ca(authority, "ca", late)
    content = certs.leaf(None, authority, NAMES, late)
    assert verifies(leaf_of(content), content[BUNDLE], late)


def rsa_key() -> bytes:
    return rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def locked(key: bytes) -> bytes:
    secret = serialization.BestAvailableEncryption(b"secret")
    loaded = serialization.load_pem_private_key(key, None)
    return loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)


@pytest.mark.parametrize(
    "broken", ["empty", "no certificate", "no key", "another key", "an RSA key", "an encrypted key", "no PEM"]
)
def test_a_ca_that_is_no_key_pair_is_an_error_and_is_not_replaced(broken: str) -> None:
    good = certs.ca(None, "ca", BEGIN)
    contents: dict[str, Data] = {
        "empty": {},
        "no certificate": {KEY: good[KEY]},
        "no key": {CERTIFICATE: good[CERTIFICATE], KEY: b""},
        "another key": {**good, KEY: certs.ca(None, "ca", BEGIN)[KEY]},
        "an RSA key": {**good, KEY: rsa_key()},
        "an encrypted key": {**good, KEY: locked(good[KEY])},
        "no PEM": {CERTIFICATE: b"x", KEY: b"y"},
    }
    with pytest.raises(ValueError, match=r".+"):
        certs.ca(contents[broken], "ca", BEGIN)
    with pytest.raises(ValueError, match=r".+"):
        certs.leaf(None, contents[broken], NAMES, BEGIN)


def test_long_names_fit_into_a_certificate() -> None:
    name = "a" * 63 + "." + "b" * 63
    authority = certs.ca(None, "c" * 60, BEGIN)
    assert leaf_of(certs.leaf(None, authority, (name,), BEGIN)).subject.rfc4514_string() == f"CN={name[:64]}"


def test_tokens_are_long_and_new() -> None:
    tokens = {certs.token() for _ in range(50)}
    assert len(tokens) == 50
    assert {len(base64.urlsafe_b64decode(token + "=")) for token in tokens} == {32}
