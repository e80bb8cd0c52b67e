"""Fixtures of the gateway tests: a certificate, and the hardened gateway in front of a stand-in engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gateway.gateway import MODEL, Gateway, make_certificate, started


@pytest.fixture(scope="session")
def certificate() -> tuple[str, str]:
    return make_certificate()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, certificate: tuple[str, str]) -> Iterator[Gateway]:
    """The hardened gateway over TLS; one per module."""
    with started(MODEL, tmp_path_factory.mktemp("gateway"), certificate) as gateway:
        yield gateway
