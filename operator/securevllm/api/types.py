"""The resource as pydantic models: the source of the CRD, of the API reference and of everything that reads a spec.

Field names in YAML are the camelCase aliases. Defaults that matter for security live here and not in the CRD: the API
server would freeze them in etcd, and a safer default of a later release would change nothing. Only fields marked
``CRD_DEFAULT`` get a ``default:`` in the schema; all are told at the end of the description. Cross-field rules that
CEL can express stand beside the model that they concern; ``parse.py`` and ``applicable.py`` judge again, in the
operator, and say what to write instead.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field

from securevllm.api.fields import (
    CRD_DEFAULT,
    Annotations,
    Cidr,
    DnsLabel,
    DnsName,
    Duration,
    HttpsUrl,
    Image,
    LabelKey,
    Labels,
    Model,
    ModelName,
    Port,
    ProxyUrl,
    Quantity,
    Why,
    Word,
    at_most_one,
    exactly_one,
    listed,
    rule,
    rules,
)
from securevllm.api.placement import Affinity, LabelSelector, Toleration, TopologySpreadConstraint

GROUP = "securevllm.io"
API_VERSION = f"{GROUP}/v1alpha1"
KIND = "SecureVLLMDeployment"

NAME_LIMIT = 40
"""Longest ``metadata.name``: a StatefulSet name has 52 characters, and members add ``-12-12`` and a suffix."""

Risk = Literal[
    "vllmVersionBelowFloor",
    "trustRemoteCode",
    "promptsInLogs",
    "requestChatTemplates",
    "tensorsInRequests",
    "networkDevices",
]
"""What may be taken in words (catalogue/data/risks.toml)."""

Profile = Literal["chat", "embeddings", "responses", "messages", "score", "rerank", "audio", "realtime"]


class Bounds(NamedTuple):
    """Smallest and largest value of a duration or of a quantity, as they are written."""

    least: str
    most: str

    def __str__(self) -> str:
        return f"from {self.least} to {self.most}"


STARTUP_TIMEOUT = Bounds("1s", "24h")
GRACE_PERIOD = Bounds("1s", "24h")
"""Not 0s: preStop, which lets the gateway notice that the pod goes, needs a second of it."""
VERIFICATION_INTERVAL = Bounds("10s", "24h")
REQUEST_BODY = Bounds("1Ki", "2047Mi")
"""Envoy counts in 32 bits."""
GATEWAY_MEMORY = "64Mi"
"""Envoy sheds load at a share of its memory; with less it would refuse everything."""


def _lasts(bounds: Bounds) -> dict[str, Any]:
    expression = f"duration(self) >= duration('{bounds.least}') && duration(self) <= duration('{bounds.most}')"
    return rules(rule(expression, str(bounds)))


def _amounts(bounds: Bounds) -> dict[str, Any]:
    amount = "quantity(string(self)).compareTo"
    return rules(
        rule(f"{amount}(quantity('{bounds.least}')) >= 0 && {amount}(quantity('{bounds.most}')) <= 0", str(bounds))
    )


_POSITIVE = rules(rule("quantity(string(self)).isGreaterThan(quantity('0'))", "more than 0"))


# ---------------------------------------------------------------------------------------------- Kubernetes' own types


class Resources(Model):
    """core/v1 ResourceRequirements: cpu, memory, ephemeral-storage and GPUs. Other extended resources are refused."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.requests) || !has(self.limits) || self.requests.all(name, !(name in self.limits)"
                " || quantity(string(self.requests[name])).compareTo(quantity(string(self.limits[name]))) <= 0)",
                "a request is at most the limit",
            )
        )
    )

    requests: Annotated[dict[LabelKey, Quantity], Field(max_length=8)] = Field(
        default_factory=dict, description="What is reserved on the node. Absent: the limits."
    )
    limits: Annotated[dict[LabelKey, Quantity], Field(max_length=8)] = Field(
        default_factory=dict, description="What is never exceeded. GPUs stand here."
    )


class SecretRef(Model):
    """A Secret of the same namespace."""

    name: DnsName = Field(description="Name of the Secret.")


class SecretKeyRef(SecretRef):
    """One key of a Secret of the same namespace."""

    key: Annotated[str, Field(max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")] = Field(description="Key in its data.")


class ConfigMapRef(Model):
    """A ConfigMap of the same namespace."""

    name: DnsName = Field(description="Name of the ConfigMap.")


class ConfigMapKeyRef(ConfigMapRef):
    """One key of a ConfigMap of the same namespace."""

    key: Annotated[str, Field(max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")] = Field(description="Key in its data.")


class Peers(Model):
    """Who a rule is about: pods by label, in this or in other namespaces, or addresses outside the cluster."""

    namespace_selector: LabelSelector | None = Field(
        None, description="Namespaces of the pods. Absent: the namespace of this resource."
    )
    pod_selector: LabelSelector | None = Field(None, description="Pods. Absent: all pods of the selected namespaces.")
    cidrs: Annotated[tuple[Cidr, ...], Field(json_schema_extra=listed())] = Field(
        (), description="Addresses outside the cluster. Never pods or nodes: engines read such a rule differently."
    )


# ---------------------------------------------------------------------------------------------------------- the model


class ModelStorage(Model):
    """Where fetched weights are kept."""

    claim_name: DnsName | None = Field(None, description="An existing PersistentVolumeClaim. Absent: one is made.")
    size: Quantity = Field("100Gi", description="Size of the claim that is made.", json_schema_extra=_POSITIVE)
    storage_class_name: DnsName | None = Field(
        None, description="Storage class of the claim that is made. Absent: the default class of the cluster."
    )
    access_modes: Annotated[
        tuple[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"], ...],
        Field(
            json_schema_extra=listed(set_=True, limit=4)
            | rules(
                rule("!('ReadWriteOncePod' in self) || size(self) == 1", "ReadWriteOncePod stands beside no other mode")
            ),
            min_length=1,
        ),
    ] = Field(("ReadWriteOnce",), description="Access modes of the claim that is made.")


class HuggingFaceSource(Model):
    """Fetch the model from a Hugging Face hub: a Job with its own egress and token fills the volume."""

    token_secret_ref: SecretKeyRef | None = Field(None, description="Access token; only the fetch Job sees it.")
    storage: ModelStorage = Field(default_factory=ModelStorage, description="Where the fetched weights are kept.")
    endpoint: HttpsUrl | None = Field(None, description="Hub to fetch from (HF_ENDPOINT). Absent: the public hub.")


class ClaimSource(Model):
    """The model is in a PersistentVolumeClaim already; it is mounted read-only."""

    claim_name: DnsName = Field(description="Name of the PersistentVolumeClaim.")
    path: Annotated[str, Field(max_length=253, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")] | None = Field(
        None, description="Folder of the model in the volume. Absent: its root."
    )


class ImageSource(Model):
    """The model is an OCI image, mounted as a volume."""

    reference: Image = Field(description="The image. Not supported yet.")


class ModelSource(Model):
    """Where the weights come from. Exactly one."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("huggingFace", "persistentVolumeClaim", "image")))

    hugging_face: HuggingFaceSource | None = Field(
        None, description="Fetch from a Hugging Face hub: a Job with its own egress and token fills a volume."
    )
    persistent_volume_claim: ClaimSource | None = Field(
        None, description="The weights are in a PersistentVolumeClaim already; it is mounted read-only."
    )
    image: ImageSource | None = Field(None, description="The weights are an OCI image. Not supported yet.")


class ModelSpec(Model):
    """What is served."""

    name: ModelName = Field(
        description="What `vllm serve` gets: a repository such as meta-llama/Llama-3.1-8B-Instruct, or an absolute path"
        " that the image itself holds, which needs no source."
    )
    served_name: Word | None = Field(None, description="Name that clients use (--served-model-name). Absent: the name.")
    revision: Word | None = Field(None, description="Commit, tag or branch of the repository. Pin a commit.")
    source: ModelSource | None = Field(
        None, description="Where the weights come from; exactly one of its fields. Required unless name is a path."
    )


RouterArgument = Annotated[str, Field(max_length=1024, pattern=r"^--[a-z0-9-]+(=[A-Za-z0-9._:/+-]*)?$")]


# ---------------------------------------------------------------------------------------------------------- topology


class DataParallel(Model):
    """Data parallelism (--data-parallel-size and its relatives)."""

    size: Annotated[int, Field(ge=1, le=1024)] = Field(description="Data-parallel ranks (--data-parallel-size).")
    size_local: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Ranks in one pod (--data-parallel-size-local). Absent: spread evenly."
    )
    load_balancing: Literal["internal", "hybrid", "external"] = Field(
        "internal", description="Who spreads requests over the ranks: vLLM, vLLM within a pod, or the gateway."
    )


class Parallelism(Model):
    """How one model replica is spread over GPUs and pods."""

    tensor: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="GPUs over which each layer is spread (--tensor-parallel-size)."
    )
    pipeline: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="Groups of layers one after the other (--pipeline-parallel-size)."
    )
    nodes: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description="Pods of one model replica (--nnodes). More than 1: they are a group that starts and ends as one.",
    )
    expert: bool = Field(
        False, description="Spread experts over tensor and data-parallel ranks (--enable-expert-parallel)."
    )
    data: DataParallel | None = Field(None, description="Data parallelism within a replica.")


class DisaggregatedRole(Model):
    """The prefill or the decode side."""

    replicas: Annotated[int, Field(ge=0, le=512)] = Field(1, description="Replicas of this side.")
    parallelism: Parallelism = Field(
        default_factory=Parallelism, description="How one replica of this side is spread over GPUs and pods."
    )


class RouterSpec(Model):
    """The router between gateway and the two sides: vllm-router, as dangerous as an engine."""

    image: Image = Field(description="Image that holds the program vllm-router.")
    replicas: Annotated[int, Field(ge=0, le=16)] = Field(1, description="Router pods.")
    args: Annotated[tuple[RouterArgument, ...], Field(json_schema_extra=listed(limit=16))] = Field(
        (), description="Further flags of vllm-router, as --flag=value; exact names of the allowlist only."
    )
    resources: Resources | None = Field(None, description="cpu, memory and ephemeral-storage of a router pod.")


class Disaggregation(Model):
    """Prefill and decode in pods of their own, with a KV transfer between them."""

    connector: Literal["nixl", "mooncake", "mooncakeStore", "moriio", "lmcache", "p2pNccl"] = Field(
        description="What moves the KV cache from prefill to decode: nixl or mooncake; others are not supported yet."
    )
    prefill: DisaggregatedRole = Field(default_factory=DisaggregatedRole, description="The side that reads prompts.")
    decode: DisaggregatedRole = Field(default_factory=DisaggregatedRole, description="The side that writes answers.")
    router: RouterSpec = Field(description="The router between the gateway and both sides.")


class Ports(Model):
    """Every fixed port. Absent: vLLM's default (catalogue/data/sockets.toml)."""

    api: Port | None = Field(None, description="HTTP API (--port), default 8000.")
    torch_distributed: Port | None = Field(None, description="torch.distributed (--master-port), default 29501.")
    data_parallel_master: Port | None = Field(
        None, description="Master port of offline data parallelism: refused, a server draws a random one."
    )
    data_parallel_rpc: Port | None = Field(None, description="--data-parallel-rpc-port, default 29550.")
    kv_transfer: Port | None = Field(
        None, description="kv_port of P2pNccl, which vLLM 0.24 removed: refused; the modern one is nixlSideChannel."
    )
    nixl_side_channel: Port | None = Field(
        None, description="VLLM_NIXL_SIDE_CHANNEL_PORT, default 5600 + data-parallel rank."
    )
    mooncake_bootstrap: Port | None = Field(None, description="VLLM_MOONCAKE_BOOTSTRAP_PORT, default 8998.")
    kv_events: Port | None = Field(
        None, description="KV event publisher, default 5557; data-parallel rank n has port + n."
    )
    barrier: Port | None = Field(None, description="Where the gates of a group's pods meet, default 29499.")
    metrics: Port | None = Field(None, description="Where security.metrics.from may scrape an engine, default 9464.")

    def number(self, name: str) -> int | None:
        """The port that the spec gives, by its name in YAML; None: the default.

        Raises:
            KeyError: there is no such field.
        """
        fields = {field.alias: attribute for attribute, field in type(self).model_fields.items()}
        found: int | None = getattr(self, fields[name])
        return found


# ------------------------------------------------------------------------------------------------------------ engine


class EnvVarSource(Model):
    """Where the value of a variable comes from: exactly one key."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("secretKeyRef", "configMapKeyRef")))

    secret_key_ref: SecretKeyRef | None = Field(None, description="A key of a Secret; none of the operator's own.")
    config_map_key_ref: ConfigMapKeyRef | None = Field(None, description="A key of a ConfigMap.")


class EnvVar(Model):
    """One environment variable of the engine. Only names of the catalogue's allowlist; there is no envFrom."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("value", "valueFrom")))

    name: Annotated[str, Field(max_length=128, pattern=r"^[A-Z_][A-Z0-9_]*$")] = Field(
        description="Name of the variable; one of the allowlist."
    )
    value: Annotated[str, Field(max_length=1024, pattern=r"^[^$\x00-\x1f\x7f]*$")] | None = Field(
        None, description="Plain text on one line; no $ (Kubernetes would expand it)."
    )
    value_from: EnvVarSource | None = Field(None, description="One key of a Secret or of a ConfigMap.")


# Printable ASCII without "$", which Kubernetes expands. The guard reads what is left.
Argument = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[ -#%-~]+$")]


class ClaimVolume(Model):
    """A PersistentVolumeClaim of the same namespace."""

    claim_name: DnsName = Field(description="Name of the PersistentVolumeClaim.")
    read_only: bool = Field(True, description="Whether engines may only read it.")


class SecretVolume(Model):
    """Files from a Secret of the same namespace, one per key."""

    secret_name: DnsName = Field(description="Name of the Secret; none of the operator's own.")


class EmptyDirVolume(Model):
    """Scratch space that goes with the pod."""

    size_limit: Quantity = Field(
        "1Gi", description="The pod is evicted when it holds more.", json_schema_extra=_POSITIVE
    )


class EngineVolume(Model):
    """A further volume of the engine. Nothing else is offered: no host path, no inline CSI, no projected token."""

    model_config = ConfigDict(
        json_schema_extra=rules(exactly_one("configMap", "secret", "persistentVolumeClaim", "emptyDir"))
    )

    name: Annotated[DnsLabel, Field(max_length=50)] = Field(description="Name of the volume.")
    mount_path: Annotated[
        str,
        Field(
            max_length=253,
            pattern=r"^(/[A-Za-z0-9_][A-Za-z0-9._-]*)+$",
            json_schema_extra=rules(
                rule("self.startsWith('/data/') || self.startsWith('/mnt/')", "volumes are mounted below /data or /mnt")
            ),
        ),
    ] = Field(description="Folder in the engine's container, below /data or /mnt.")
    config_map: ConfigMapRef | None = Field(None, description="Files from a ConfigMap; read-only.")
    secret: SecretVolume | None = Field(None, description="Files from a Secret; read-only.")
    persistent_volume_claim: ClaimVolume | None = Field(None, description="A PersistentVolumeClaim.")
    empty_dir: EmptyDirVolume | None = Field(None, description="Scratch space that goes with the pod.")


class EngineSpec(Model):
    """The engine's process and pod."""

    args: Annotated[tuple[Argument, ...], Field(json_schema_extra=listed(limit=64))] = Field(
        (), description="Flags of `vllm serve`; exact names of the allowlist only (docs/guard.md)."
    )
    env: Annotated[tuple[EnvVar, ...], Field(json_schema_extra=listed("name", limit=64))] = Field(
        (), description="Environment variables; exact names of the allowlist only (docs/guard.md)."
    )
    resources: Resources | None = Field(
        None,
        description="cpu, memory, ephemeral-storage and GPUs. Absent: nvidia.com/gpu for the parallelism. Without a"
        " GPU entry: a CPU engine.",
    )
    node_selector: Labels = Field(default_factory=dict, description="Labels of the nodes on which the pods may run.")
    tolerations: Annotated[tuple[Toleration, ...], Field(json_schema_extra=listed())] = Field(
        (), description="Taints that the pods tolerate."
    )
    affinity: Affinity | None = Field(
        None, description="On which nodes the pods may run, and beside which other pods (core/v1 Affinity)."
    )
    topology_spread_constraints: Annotated[
        tuple[TopologySpreadConstraint, ...],
        Field(json_schema_extra=listed("topologyKey", "whenUnsatisfiable", limit=8)),
    ] = Field((), description="How evenly pods are spread over nodes or zones (core/v1 TopologySpreadConstraint).")
    priority_class_name: DnsName | None = Field(
        None, description="PriorityClass of the pods. Absent: the default of the cluster."
    )
    scheduler_name: DnsName | None = Field(None, description="Scheduler of the pods. Absent: the default scheduler.")
    runtime_class_name: DnsName | None = Field(
        None, description="RuntimeClass of the pods. Absent: the default of the nodes."
    )
    shared_memory: Quantity = Field(
        "8Gi",
        description="Size of /dev/shm, counted as memory of the pod.",
        json_schema_extra=_POSITIVE,
    )
    volumes: Annotated[tuple[EngineVolume, ...], Field(json_schema_extra=listed("name", limit=8))] = Field(
        (), description="Further volumes, mounted below /data or /mnt."
    )
    startup_timeout: Duration = Field(
        "60m",
        description="How long loading may take before the container is restarted; 1s to 24h.",
        json_schema_extra=_lasts(STARTUP_TIMEOUT),
    )
    termination_grace_period: Duration = Field(
        "60s",
        description="How long running requests may take to finish when a pod ends; 1s to 24h.",
        json_schema_extra=_lasts(GRACE_PERIOD),
    )
    labels: Labels = Field(
        default_factory=dict, description="Labels of the pods: names without a prefix, and what the platform allows."
    )
    annotations: Annotations = Field(default_factory=dict, description="Annotations of the pods; an allowlist.")


# ----------------------------------------------------------------------------------------------------------- gateway


class AllowEntry(Model):
    """One (method, path) of vLLM that the gateway lets through, beside the profiles."""

    method: Literal["GET", "POST", "DELETE", "PUT", "PATCH"] = Field(description="HTTP method.")
    path: Annotated[str, Field(max_length=256, pattern=r"^/[A-Za-z0-9_./{}-]*$")] = Field(
        description="Exactly as vLLM registers it, with its own {parameters}."
    )
    unknown_route: Why | None = Field(
        None,
        description="Why a route is opened that the catalogue does not know: a literal path, and none that could be"
        " read as a route that is never opened. Shown in status.",
    )


class Routes(Model):
    """Which routes of vLLM clients may use. Everything else is refused, by two independent layers."""

    profiles: Annotated[tuple[Profile, ...], Field(json_schema_extra=listed(set_=True, limit=8))] = Field(
        ("chat",), description="Sets of routes by use; `securevllm routes` lists them."
    )
    allow: Annotated[tuple[AllowEntry, ...], Field(json_schema_extra=listed(limit=64))] = Field(
        (), description="Single routes beside the profiles; a route that is marked never is refused."
    )


class ApiKeys(Model):
    """Client keys in Secrets: each data key is a client id, each value that client's key."""

    secret_refs: Annotated[
        tuple[SecretRef, ...], Field(json_schema_extra=listed("name", limit=16), min_length=1, max_length=16)
    ] = Field(description="The Secrets. A client id may stand in one of them only.")


class RemoteJwks(Model):
    """Public keys of an issuer, fetched over HTTPS."""

    uri: HttpsUrl = Field(description="Address of the JSON Web Key Set. The gateway gets an egress to it.")
    cache_duration: Duration = Field("10m", description="How long fetched keys are used.")


class Jwt(Model):
    """JSON Web Tokens of one issuer."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("remoteJwks", "localJwks")))

    issuer: Annotated[str, Field(min_length=1, max_length=253)] = Field(description="Exact value of the claim `iss`.")
    audiences: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=253)], ...],
        Field(json_schema_extra=listed(set_=True, limit=16), min_length=1),
    ] = Field(description="Values of the claim `aud` of which a token must have one.")
    remote_jwks: RemoteJwks | None = Field(None, description="The issuer's public keys, fetched over HTTPS.")
    local_jwks: ConfigMapKeyRef | None = Field(
        None, description="The issuer's public keys as a JSON Web Key Set in a ConfigMap."
    )


class MutualTls(Model):
    """Client certificates."""

    ca_secret_ref: SecretRef = Field(description="Secret whose ca.crt holds the CAs of client certificates.")
    subject_alt_names: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=253)], ...],
        Field(json_schema_extra=listed(set_=True, limit=64)),
    ] = Field((), description="DNS names and URIs of which a certificate must have one. Empty: any of these CAs.")


class Authentication(Model):
    """How clients prove who they are. Nothing: the operator makes one key, Secret <name>-client-keys."""

    model_config = ConfigDict(json_schema_extra=rules(at_most_one("apiKeys", "jwt", "mtls", "none")))

    api_keys: ApiKeys | None = Field(
        None, description="Keys in Secrets of yours: each data key is a client id, each value that client's key."
    )
    jwt: Jwt | None = Field(None, description="JSON Web Tokens of one issuer. Not supported yet.")
    mtls: MutualTls | None = Field(None, description="Client certificates. Not supported yet.")
    none: Annotated[str, Field(min_length=10, max_length=500, pattern=r"^I accept .*$")] | None = Field(
        None, description="No authentication: say why, beginning with `I accept `. Shown in status."
    )


class Tls(Model):
    """The gateway's server certificate. Nothing: an own CA, Secret <name>-gateway-tls with ca.crt."""

    model_config = ConfigDict(json_schema_extra=rules(at_most_one("secretName", "disabled")))

    secret_name: DnsName | None = Field(None, description="A kubernetes.io/tls Secret, as cert-manager makes it.")
    hostnames: Annotated[tuple[DnsName, ...], Field(json_schema_extra=listed(set_=True))] = Field(
        (), description="Further names of the certificate that the operator makes."
    )
    disabled: Why | None = Field(None, description="Plain HTTP: say why. Shown in status.")


class Limits(Model):
    """Limits of the gateway, per gateway pod."""

    request_body: Quantity = Field(
        "64Mi",
        description="Largest request body; larger ones get 413.",
        json_schema_extra=_amounts(REQUEST_BODY),
    )
    requests_per_second_per_client: Annotated[int, Field(ge=1, le=100000)] = Field(
        100, description="Requests of one client in a second; further ones get 429."
    )
    stream_seconds: Annotated[int, Field(ge=1, le=86400)] = Field(3600, description="Longest answer.")
    idle_seconds: Annotated[int, Field(ge=1, le=86400)] = Field(600, description="Longest silence within an answer.")
    connections: Annotated[int, Field(ge=1, le=1000000)] = Field(8192, description="Open connections of clients.")


class GatewayService(Model):
    """The Service that clients use."""

    type: Literal["ClusterIP", "LoadBalancer", "NodePort"] = Field(
        "ClusterIP", description="LoadBalancer and NodePort are open to the outside and need clients.cidrs."
    )
    annotations: Annotations = Field(
        default_factory=dict, description="Annotations that tell a load balancer how it is made; an allowlist."
    )


class Autoscaling(Model):
    """A HorizontalPodAutoscaler of the gateway."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "(has(self.minReplicas) ? self.minReplicas : 2) <= self.maxReplicas",
                "minReplicas is at most maxReplicas",
            )
        )
    )

    min_replicas: Annotated[int, Field(ge=1, le=64)] = Field(2, description="Fewest gateways.")
    max_replicas: Annotated[int, Field(ge=1, le=64)] = Field(description="Most gateways.")
    target_cpu_utilization_percentage: Annotated[int, Field(ge=1, le=100, alias="targetCPUUtilizationPercentage")] = (
        Field(80, description="CPU use, in percent of the request, at which gateways are added.")
    )


class PodDisruptionBudgetSpec(Model):
    """policy/v1 PodDisruptionBudget of the gateway."""

    max_unavailable: Annotated[int, Field(ge=0, le=64)] = Field(
        1, description="Gateways that a drain may take at once. 0 blocks drains."
    )


class GatewaySpec(Model):
    """The Envoy in front of the engines: the only way in."""

    replicas: Annotated[int, Field(ge=0, le=64, json_schema_extra=CRD_DEFAULT)] = Field(2, description="Gateway pods.")
    routes: Routes = Field(default_factory=Routes, description="Which routes of vLLM clients may use; others are 404.")
    authentication: Authentication = Field(
        default_factory=Authentication,
        description="How clients prove who they are. Absent: the operator makes one key, Secret <name>-client-keys.",
    )
    tls: Tls = Field(
        default_factory=Tls,
        description="The server certificate. Absent: an own CA and certificate, Secret <name>-gateway-tls with ca.crt.",
    )
    clients: Peers | None = Field(None, description="Who may connect. Absent: pods of the same namespace.")
    limits: Limits = Field(default_factory=Limits, description="Limits of each gateway pod.")
    service: GatewayService = Field(default_factory=GatewayService, description="The Service that clients use.")
    resources: Resources | None = Field(
        None,
        description="cpu, memory and ephemeral-storage of a gateway pod; a memory limit is at least 64Mi. Absent:"
        " requests of 100m and 128Mi, a memory limit of 512Mi.",
        json_schema_extra=rules(
            rule(
                "!has(self.limits) || !('memory' in self.limits)"
                f" || quantity(string(self.limits['memory'])).compareTo(quantity('{GATEWAY_MEMORY}')) >= 0",
                f"the gateway needs a memory limit of at least {GATEWAY_MEMORY}",
            )
        ),
    )
    autoscaling: Autoscaling | None = Field(
        None, description="A HorizontalPodAutoscaler of the gateway. Not supported yet."
    )
    pod_disruption_budget: PodDisruptionBudgetSpec = Field(
        default_factory=PodDisruptionBudgetSpec,
        description="How many gateways a drain may take; used with two replicas or more.",
    )


# ---------------------------------------------------------------------------------------------------------- security


class Media(Model):
    """Media URLs in requests: the engine would fetch them (server-side request forgery)."""

    allowed_domains: Annotated[tuple[DnsName, ...], Field(json_schema_extra=listed(set_=True))] = Field(
        (), description="Domains of media URLs (--allowed-media-domains). Empty: none."
    )
    allow_redirects: bool = Field(
        False, description="Whether engines follow redirects of media URLs (VLLM_MEDIA_URL_ALLOW_REDIRECTS)."
    )
    max_download_megabytes: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="Largest download of one medium (VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB). Absent: 256."
    )
    max_request_download_megabytes: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="All downloads of one request (VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB). Absent: 256."
    )
    max_image_pixels: Annotated[int, Field(ge=1, le=178956970)] | None = Field(
        None, description="Largest image, decoded (VLLM_MAX_IMAGE_PIXELS). Absent: 178956970."
    )


class EgressPort(Model):
    """One destination port."""

    port: Annotated[int, Field(ge=1, le=65535)] = Field(description="Number of the port.")
    protocol: Literal["TCP", "UDP"] = Field("TCP", description="Protocol.")


class EgressRule(Model):
    """One destination that engines may reach."""

    to: Peers = Field(description="The destination: pods by label, or public addresses.")
    ports: Annotated[tuple[EgressPort, ...], Field(json_schema_extra=listed(), min_length=1)] = Field(
        description="Ports of the destination."
    )
    proxy: ProxyUrl | None = Field(
        None,
        description="This destination is an HTTP proxy: engines send what they fetch through it. A policy knows"
        " addresses, a proxy knows names. In one rule only.",
    )
    why: Why = Field(description="Why this is needed. Shown in status.")


class Metrics(Model):
    """Who may scrape the metrics of engines and gateways: GET /metrics, on a port that knows no other route."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.from.podSelector) || has(self.from.namespaceSelector)"
                " || (has(self.from.cidrs) && size(self.from.cidrs) > 0)",
                "security.metrics.from names nobody: write podSelector, namespaceSelector or cidrs",
            )
        )
    )

    from_: Annotated[Peers, Field(alias="from", description="Who may scrape, for example the pods of Prometheus.")]


class KvEvents(Model):
    """Who may read which token blocks an engine has cached (--kv-events-config)."""

    from_: Annotated[Peers, Field(alias="from", description="Who may read, for example a KV-aware router.")]
    why: Why = Field(description="Why: the events hold token ids of requests. Shown in status.")


class Gate(Model):
    """The gate that holds an engine back until isolation was observed."""

    disabled: Why | None = Field(
        None, description="Engines start without having seen their isolation: say why. Shown in status."
    )


class Acceptance(Model):
    """A risk that is taken in words; shown in status."""

    risk: Risk = Field(description="Which risk; docs/guard.md tells what each gives up.")
    why: Why = Field(description="Why it is taken. Shown in status.")


class Verification(Model):
    """How isolation is measured."""

    # Not "Off": YAML 1.1 reads the bare word as false.
    mode: Literal["Enforce", "Report", "Disabled"] = Field(
        "Report",
        description="Report: what is measured is told in status. Enforce: Ready needs it, too, and while isolation is"
        " known to be broken no request reaches an engine. Disabled: nothing is measured.",
    )
    interval: Duration = Field(
        "5m", description="Time between two measurements; 10s to 24h.", json_schema_extra=_lasts(VERIFICATION_INTERVAL)
    )
    canary_pods: Literal["Enabled", "Disabled"] = Field(
        "Enabled",
        description="Short-lived pods of the operator's image in this namespace, on change and every few hours."
        " Disabled: Isolated is never True, because nothing shows what silence means.",
    )


class Security(Model):
    """Every exception from the closed default, each in words."""

    media: Media = Field(
        default_factory=Media, description="Media URLs in requests, which engines would fetch. Absent: none."
    )
    egress: Annotated[tuple[EgressRule, ...], Field(json_schema_extra=listed(limit=16))] = Field(
        (), description="What engines may reach beside DNS. Empty: nothing."
    )
    metrics: Metrics | None = Field(
        None,
        description="Who may scrape the metrics of engines and gateways. Absent: nobody, and no pod has a port for it.",
    )
    kv_events: KvEvents | None = Field(
        None, description="Who may read the engines' KV events. Absent: none are published."
    )
    gate: Gate = Field(
        default_factory=Gate, description="The gate that holds an engine back until isolation was observed."
    )
    accept: Annotated[tuple[Acceptance, ...], Field(json_schema_extra=listed("risk", limit=16))] = Field(
        (), description="Risks that are taken, each in words. Shown in status."
    )
    verification: Verification = Field(default_factory=Verification, description="How isolation is measured.")


# ---------------------------------------------------------------------------------------------------------- resource


_Release = Annotated[str, Field(max_length=32, pattern=r"^v?[0-9]{1,4}\.[0-9]{1,4}(\.[0-9]{1,4})?$")]


class VllmVersion(Model):
    """Which vLLM this is, and which it has to be."""

    assume: _Release | None = Field(
        None, description="The version of an image whose tag does not say it, for example 0.33.0. Shown in status."
    )
    minimum: _Release | None = Field(
        None,
        description="Older versions are refused. Absent: the floor of the catalogue, and beside the accepted risk"
        " vllmVersionBelowFloor nothing.",
    )


class Spec(Model):
    """What the user wants."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.disaggregation) || self.replicas == 1",
                "replicas is not used beside disaggregation: set prefill.replicas and decode.replicas",
            ),
            rule(
                "self.model.name.startsWith('/') || has(self.model.source)",
                "model.source is required unless model.name is an absolute path in the image; paste:"
                " source: {huggingFace: {}}",
            ),
            rule(
                "!has(self.gateway) || !has(self.gateway.service) || !has(self.gateway.service.type)"
                " || self.gateway.service.type == 'ClusterIP'"
                " || (has(self.gateway.clients) && has(self.gateway.clients.cidrs)"
                " && size(self.gateway.clients.cidrs) > 0)",
                "gateway.service.type LoadBalancer and NodePort need gateway.clients.cidrs: who may connect",
            ),
        )
    )

    model: ModelSpec = Field(description="The model that is served.")
    image: Image = Field(description="Image of vLLM; the version is read from its tag, or said in vllmVersion.")
    vllm_version: VllmVersion | None = Field(
        None, description="Which vLLM this is, when the tag of the image does not say it, and which it has to be."
    )
    image_pull_secrets: Annotated[tuple[SecretRef, ...], Field(json_schema_extra=listed("name", limit=8))] = Field(
        (), description="Secrets with credentials of the registry."
    )
    replicas: Annotated[int, Field(ge=0, le=512, json_schema_extra=CRD_DEFAULT)] = Field(
        1, description="Model replicas."
    )
    parallelism: Parallelism = Field(
        default_factory=Parallelism, description="How one model replica is spread over GPUs and pods."
    )
    disaggregation: Disaggregation | None = Field(
        None, description="Prefill and decode in pods of their own, with a router in front."
    )
    ports: Ports = Field(default_factory=Ports, description="Every fixed port. Absent: vLLM's defaults.")
    engine: EngineSpec = Field(default_factory=EngineSpec, description="The engine's process and pod.")
    suspend: bool = Field(False, description="Scale to nothing; policies are kept.")
    update_policy: Literal["WithSpec", "Always"] = Field(
        "WithSpec",
        description="WithSpec: an operator upgrade restarts no engine; it is shown as Outdated, and rolled with the"
        " next change of the spec. Always: it is rolled at once.",
    )
    gateway: GatewaySpec = Field(
        default_factory=GatewaySpec, description="The Envoy in front of the engines: the only way in."
    )
    security: Security = Field(
        default_factory=Security, description="Exceptions from the closed default, and how isolation is measured."
    )


class Condition(Model):
    """meta/v1 Condition."""

    type: Annotated[str, Field(max_length=316)] = Field(
        description="Accepted, EnginesReady, GatewayReady, Isolated, Ready or Stalled."
    )
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: Annotated[str, Field(max_length=1024)] = Field(description="Why, in one word for programs.")
    message: Annotated[str, Field(max_length=32768)] = Field(description="Why, in words, and what to do.")
    last_transition_time: Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})] = Field(
        description="When the status changed last."
    )
    observed_generation: int | None = Field(None, description="Generation of the spec that this is about.")


class AdvisoryStatus(Model):
    """A published hole of the vLLM that runs."""

    id: Annotated[str, Field(max_length=64)] = Field(description="CVE, GHSA or PYSEC number.")
    severity: Literal["critical", "high", "medium"] = Field(description="How bad it is.")
    control: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="What of this operator keeps an attacker away. Absent: only a newer version helps."
    )
    fixed_in: Annotated[str, Field(max_length=32)] | None = Field(
        None, description="First vLLM release without it. Absent: none is known."
    )


class Status(Model):
    """What the operator saw."""

    observed_generation: int | None = Field(
        None, description="Generation of the spec that was looked at last; -1 before the first look."
    )
    operator: Annotated[str, Field(max_length=192)] | None = Field(
        None,
        description="The installation that cares for this resource: namespace and name of its Lease. Every other one"
        " leaves it alone.",
    )
    replicas: int | None = Field(None, description="Model replicas that exist.")
    ready_replicas: int | None = Field(None, description="Model replicas that serve.")
    selector: Annotated[str, Field(max_length=1024)] | None = Field(
        None, description="Selects exactly one pod per model replica (scale subresource)."
    )
    url: Annotated[str, Field(max_length=1024)] | None = Field(
        None, description="Where clients of the cluster find the gateway."
    )
    vllm_version: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="The vLLM version whose routes are rendered: a claim of the image's tag, or of the spec."
    )
    running_version: Annotated[str, Field(max_length=64)] | None = Field(
        None,
        description="The vLLM version that engines say they are. Absent: none was asked yet, or a router is in front of"
        " them; then vllmVersion is only a claim.",
    )
    advisories: Annotated[tuple[AdvisoryStatus, ...], Field(json_schema_extra=listed("id", limit=64))] = Field(
        (), description="Published holes of this vLLM version that concern this spec, worst first."
    )
    last_verified: Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})] | None = Field(
        None, description="When isolation was measured last."
    )
    outdated: Annotated[tuple[Annotated[str, Field(max_length=253)], ...], Field(json_schema_extra=listed())] = Field(
        (), description="Workloads whose template a newer operator would change; rolled with the next change of spec."
    )
    accepted_risks: Annotated[
        tuple[Annotated[str, Field(max_length=1024)], ...], Field(json_schema_extra=listed(limit=64))
    ] = Field((), description="What the spec gave up, in its own words.")
    conditions: Annotated[tuple[Condition, ...], Field(json_schema_extra=listed("type", limit=16))] = Field(
        (), description="What holds and what does not (meta/v1 Condition)."
    )
