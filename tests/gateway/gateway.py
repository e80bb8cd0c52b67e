"""A gateway and an engine to test with: the model, the clients, a certificate, and one call that starts it all."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from securevllm.render.envoy import ClientKey, GatewayModel
from tests.gateway import attacks
from tests.gateway.engine import Engine, serving
from tests.gateway.envoy_process import Envoy, local_model, running

KEYS = [ClientKey("alice", attacks.KEY), ClientKey("bob", attacks.OTHER_KEY)]

MODEL = GatewayModel(
    version_path="/version",
    name="llama-gateway",
    listen_port=8443,
    ops_port=9902,
    admin_port=9901,
    metrics_port=9903,
    routes=attacks.ALLOWED,
    upstream_host="llama-engine.ns.svc.cluster.local",
    upstream_port=8000,
    tls=True,
    hostnames=(),
    authentication=True,
    request_body_bytes=attacks.BODY_LIMIT,
    requests_per_second_per_client=100_000,
    stream_seconds=60,
    stream_idle_seconds=30,
    max_clients=100,
    heap_bytes=400 << 20,
    connections=1000,
)


@dataclass
class Gateway:
    """A gateway and the engine behind it."""

    envoy: Envoy
    engine: Engine

    @property
    def port(self) -> int:
        """Where clients connect."""
        return self.envoy.model.listen_port


def make_certificate(serial: int = 1) -> tuple[str, str]:
    """A self-signed certificate for ``gateway``: PEM chain and PEM key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway")])
    start = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("gateway")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()


@contextmanager
def started(
    model: GatewayModel, root: Path, certificate: tuple[str, str] | None = None, *, keys: Sequence[ClientKey] = KEYS
) -> Iterator[Gateway]:
    """The model's gateway on free ports of 127.0.0.1 in front of a stand-in engine.

    Args:
        model: its ports and its upstream's name do not matter.
        root: an empty directory.
        certificate: PEM chain and key, when the model serves TLS.
        keys: the clients' keys.
    """
    with (
        serving() as engine,
        running(
            local_model(model, engine.port),
            root=root,
            keys=list(keys),
            engine_key=attacks.ENGINE_KEY,
            certificate=certificate,
        ) as envoy,
    ):
        yield Gateway(envoy, engine)
