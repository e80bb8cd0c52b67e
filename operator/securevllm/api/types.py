"""The resource as pydantic models: the source of the CRD, of the API reference and of everything that reads a spec.

Field names in YAML are the camelCase aliases. Defaults that matter for security live here and not in the CRD: the API
server would freeze them in etcd, and a safer default of a later release would change nothing. Only fields marked
``CRD_DEFAULT`` get a ``default:`` in the schema. Cross-field rules that CEL can express stand beside the model that
they concern; ``parse.py`` judges again, in the operator, and says what to write instead.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.alias_generators import to_camel

GROUP = "securevllm.io"
API_VERSION = f"{GROUP}/v1alpha1"
KIND = "SecureVLLMDeployment"

NAME_LIMIT = 40
"""Longest ``metadata.name``: a StatefulSet name has 52 characters, and members add ``-12-12`` and a suffix."""

CRD_DEFAULT: dict[str, Any] = {"x-crd-default": True}


def rule(expression: str, message: str) -> dict[str, JsonValue]:
    """One entry of ``x-kubernetes-validations`` (CEL)."""
    return {"rule": expression, "message": message}


def _at_most_one(fields: tuple[str, ...], message: str) -> dict[str, JsonValue]:
    return rule(" + ".join(f"(has(self.{name}) ? 1 : 0)" for name in fields) + " <= 1", message)


class Model(BaseModel):
    """Base of all models: immutable, no unknown fields, camelCase in YAML."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")


# A value that becomes a command-line argument never begins with "-": vLLM's parser would read it as a flag.
ModelName = Annotated[str, Field(max_length=253, pattern=r"^[A-Za-z0-9/][A-Za-z0-9._/-]*$")]
Word = Annotated[str, Field(max_length=253, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
Image = Annotated[str, Field(max_length=512, pattern=r"^[a-z0-9][A-Za-z0-9._/:-]*(@sha256:[a-f0-9]{64})?$")]
DnsLabel = Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
DnsName = Annotated[str, Field(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Port = Annotated[int, Field(ge=1024, le=65535)]
Quantity = Annotated[
    str | int,
    Field(json_schema_extra={"x-kubernetes-int-or-string": True, "maxLength": 32}),
]
Duration = Annotated[str, Field(max_length=16, pattern=r"^[0-9]{1,6}(s|m|h)$")]
Why = Annotated[str, Field(min_length=10, max_length=500)]
Cidr = Annotated[str, Field(max_length=49, pattern=r"^[0-9a-fA-F.:]+/[0-9]{1,3}$")]
LabelKey = Annotated[str, Field(max_length=317, pattern=r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]
LabelValue = Annotated[str, Field(max_length=63, pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$")]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=32)]
Profile = Literal["chat", "embeddings", "responses", "messages", "score", "rerank", "audio", "realtime"]
Opaque = Annotated[
    dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True, "maxProperties": 64})
]


def _list(*, key: str | None = None, limit: int = 32, set_: bool = False) -> dict[str, Any]:
    """List type for server-side apply (Kubernetes API conventions, "merge strategy")."""
    kind = "map" if key else "set" if set_ else "atomic"
    extra: dict[str, Any] = {"x-kubernetes-list-type": kind, "maxItems": limit}
    if key:
        extra["x-kubernetes-list-map-keys"] = [key]
    return extra


# ---------------------------------------------------------------------------------------------- Kubernetes' own types


class LabelSelectorRequirement(Model):
    """meta/v1 LabelSelectorRequirement."""

    key: LabelKey
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: Annotated[tuple[LabelValue, ...], Field(max_length=32)] = ()


class LabelSelector(Model):
    """meta/v1 LabelSelector. An empty one selects everything."""

    match_labels: Labels = Field(default_factory=dict)
    match_expressions: Annotated[tuple[LabelSelectorRequirement, ...], Field(json_schema_extra=_list())] = ()


class Toleration(Model):
    """core/v1 Toleration."""

    key: LabelKey | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: Annotated[str, Field(max_length=63)] | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: Annotated[int, Field(ge=0, le=86400)] | None = None


class Resources(Model):
    """core/v1 ResourceRequirements: cpu, memory, ephemeral-storage and GPUs. Other extended resources are refused."""

    requests: Annotated[dict[LabelKey, Quantity], Field(max_length=8)] = Field(default_factory=dict)
    limits: Annotated[dict[LabelKey, Quantity], Field(max_length=8)] = Field(default_factory=dict)


class SecretRef(Model):
    """A Secret of the same namespace."""

    name: DnsName = Field(description="Name of the Secret.")


class SecretKeyRef(SecretRef):
    """One key of a Secret of the same namespace."""

    key: Annotated[str, Field(max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")] = Field(description="Key in its data.")


class Peers(Model):
    """Who a rule is about: pods by label, in this or in other namespaces, or addresses outside the cluster."""

    namespace_selector: LabelSelector | None = Field(
        None, description="Namespaces of the pods. Absent: the namespace of this resource."
    )
    pod_selector: LabelSelector | None = Field(None, description="Pods. Absent: all pods of the selected namespaces.")
    cidrs: Annotated[tuple[Cidr, ...], Field(json_schema_extra=_list())] = Field(
        (), description="Addresses outside the cluster. Never pods or nodes: engines read such a rule differently."
    )


# ---------------------------------------------------------------------------------------------------------- the model


class ModelStorage(Model):
    """Where fetched weights are kept."""

    claim_name: DnsName | None = Field(None, description="An existing PersistentVolumeClaim. Absent: one is made.")
    size: Quantity = Field("100Gi", description="Size of the claim that is made.")
    storage_class_name: DnsName | None = Field(None, description="Storage class of the claim that is made.")
    access_modes: Annotated[
        tuple[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"], ...],
        Field(json_schema_extra=_list(set_=True, limit=4), min_length=1),
    ] = Field(("ReadWriteOnce",), description="Access modes of the claim that is made.")


class HuggingFaceSource(Model):
    """Fetch the model from a Hugging Face hub: a Job with its own egress and token fills the volume."""

    token_secret_ref: SecretKeyRef | None = Field(None, description="Access token; only the fetch Job sees it.")
    storage: ModelStorage = Field(default_factory=ModelStorage)
    endpoint: Annotated[str, Field(max_length=253, pattern=r"^https://[A-Za-z0-9][A-Za-z0-9.:/-]*$")] | None = Field(
        None, description="Hub to fetch from (HF_ENDPOINT). Absent: the public hub."
    )


class ClaimSource(Model):
    """The model is in a PersistentVolumeClaim already; it is mounted read-only."""

    claim_name: DnsName
    path: Annotated[str, Field(max_length=253, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")] | None = Field(
        None, description="Folder of the model in the volume. Absent: its root."
    )


class ImageSource(Model):
    """The model is an OCI image, mounted as a volume."""

    reference: Image


class ModelSource(Model):
    """Where the weights come from. Exactly one."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                rule(
                    "(has(self.huggingFace) ? 1 : 0) + (has(self.persistentVolumeClaim) ? 1 : 0)"
                    " + (has(self.image) ? 1 : 0) == 1",
                    "exactly one of huggingFace, persistentVolumeClaim and image",
                )
            ]
        }
    )

    hugging_face: HuggingFaceSource | None = None
    persistent_volume_claim: ClaimSource | None = None
    image: ImageSource | None = None


class ModelSpec(Model):
    """What is served."""

    name: ModelName = Field(
        description="What `vllm serve` gets: a repository such as meta-llama/Llama-3.1-8B-Instruct, or an absolute path"
        " that the image itself holds, which needs no source."
    )
    served_name: Word | None = Field(None, description="--served-model-name. Absent: the name.")
    revision: Word | None = Field(None, description="Commit, tag or branch of the repository. Pin a commit.")
    source: ModelSource | None = None


# ---------------------------------------------------------------------------------------------------------- topology


class DataParallel(Model):
    """Data parallelism (--data-parallel-size and its relatives)."""

    size: Annotated[int, Field(ge=1, le=1024)]
    size_local: Annotated[int, Field(ge=1, le=1024)] | None = None
    load_balancing: Literal["internal", "hybrid", "external"] = "internal"


class Parallelism(Model):
    """How one model replica is spread over GPUs and pods."""

    tensor: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="--tensor-parallel-size.")
    pipeline: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="--pipeline-parallel-size.")
    nodes: Annotated[int, Field(ge=1, le=64)] = Field(1, description="Pods of one model replica (--nnodes).")
    expert: bool = Field(False, description="--enable-expert-parallel.")
    data: DataParallel | None = None


class DisaggregatedRole(Model):
    """The prefill or the decode side."""

    replicas: Annotated[int, Field(ge=0, le=512)] = 1
    parallelism: Parallelism = Field(default_factory=Parallelism)


class RouterSpec(Model):
    """The router between gateway and the two sides."""

    image: Image
    args: Annotated[tuple[Word, ...], Field(json_schema_extra=_list())] = ()


class Disaggregation(Model):
    """Prefill and decode in pods of their own, with a KV transfer between them."""

    connector: Literal["nixl", "mooncake"]
    prefill: DisaggregatedRole = Field(default_factory=DisaggregatedRole)
    decode: DisaggregatedRole = Field(default_factory=DisaggregatedRole)
    router: RouterSpec | None = None


class Ports(Model):
    """Every fixed port. Absent: vLLM's default (catalogue/data/sockets.toml)."""

    api: Port | None = Field(None, description="HTTP API (--port), default 8000.")
    torch_distributed: Port | None = Field(None, description="torch.distributed (--master-port), default 29501.")
    data_parallel_master: Port | None = Field(None, description="Data-parallel master, default 29500.")
    data_parallel_rpc: Port | None = Field(None, description="--data-parallel-rpc-port, default 29550.")
    kv_transfer: Port | None = Field(None, description="kv_port of P2pNccl in old versions, default 14579.")
    nixl_side_channel: Port | None = Field(None, description="VLLM_NIXL_SIDE_CHANNEL_PORT, default 5600.")
    mooncake_bootstrap: Port | None = Field(None, description="VLLM_MOONCAKE_BOOTSTRAP_PORT, default 8998.")
    kv_events: Port | None = Field(None, description="KV event publisher, default 5557.")


# ------------------------------------------------------------------------------------------------------------ engine


class EnvVar(Model):
    """One environment variable of the engine, in plain text. Only names of the catalogue's allowlist."""

    name: Annotated[str, Field(max_length=128, pattern=r"^[A-Z_][A-Z0-9_]*$")]
    value: Annotated[str, Field(max_length=1024, pattern=r"^[^$]*$")] = Field(
        description="Plain text; no $ (Kubernetes would expand it)."
    )


Argument = Annotated[str, Field(max_length=1024, pattern=r"^--[a-z0-9-]+(=[A-Za-z0-9._:/+-]*)?$")]


class EngineSpec(Model):
    """The engine's process and pod."""

    args: Annotated[tuple[Argument, ...], Field(json_schema_extra=_list(limit=64))] = Field(
        (), description="Flags of `vllm serve`, as --flag or --flag=value; exact names of the allowlist only."
    )
    env: Annotated[tuple[EnvVar, ...], Field(json_schema_extra=_list(key="name", limit=64))] = ()
    resources: Resources | None = Field(
        None, description="Absent: nvidia.com/gpu for the parallelism. Without a GPU entry: a CPU engine."
    )
    node_selector: Labels = Field(default_factory=dict)
    tolerations: Annotated[tuple[Toleration, ...], Field(json_schema_extra=_list())] = ()
    affinity: Opaque | None = Field(None, description="core/v1 Affinity.")
    topology_spread_constraints: Annotated[tuple[Opaque, ...], Field(json_schema_extra=_list(limit=8))] = Field(
        (), description="core/v1 TopologySpreadConstraint."
    )
    priority_class_name: DnsName | None = None
    scheduler_name: DnsName | None = None
    runtime_class_name: DnsName | None = None
    shared_memory: Quantity = Field("8Gi", description="Size of /dev/shm, counted as memory of the pod.")
    volumes: Annotated[tuple[Opaque, ...], Field(json_schema_extra=_list(limit=8))] = Field(
        (), description="Further read-only volumes."
    )
    startup_timeout: Duration = Field("60m", description="How long loading may take before the pod is restarted.")
    termination_grace_period: Duration = Field("60s", description="How long running requests may finish.")
    labels: Labels = Field(default_factory=dict, description="Labels of the pods; none of securevllm.io or Kubernetes.")
    annotations: Annotated[dict[LabelKey, Annotated[str, Field(max_length=1024)]], Field(max_length=16)] = Field(
        default_factory=dict, description="Annotations of the pods; none that a CNI, CRI or mesh reads."
    )


# ----------------------------------------------------------------------------------------------------------- gateway


class AllowEntry(Model):
    """One (method, path) of vLLM that the gateway lets through, beside the profiles."""

    method: Literal["GET", "POST", "DELETE", "PUT", "PATCH"]
    path: Annotated[str, Field(max_length=256, pattern=r"^/[A-Za-z0-9_./{}-]*$")] = Field(
        description="Exactly as vLLM registers it, with its own {parameters}."
    )


class Routes(Model):
    """Which routes of vLLM clients may use. Everything else is refused, by two independent layers."""

    profiles: Annotated[tuple[Profile, ...], Field(json_schema_extra=_list(set_=True, limit=8))] = Field(
        ("chat",), description="Sets of routes by use; `securevllm routes` lists them."
    )
    allow: Annotated[tuple[AllowEntry, ...], Field(json_schema_extra=_list(limit=64))] = Field(
        (), description="Single routes beside the profiles; a route that is marked never is refused."
    )


class ApiKeys(Model):
    """Client keys in Secrets: each data key is a client id, each value that client's key."""

    secret_refs: Annotated[
        tuple[SecretRef, ...], Field(json_schema_extra=_list(key="name", limit=16), min_length=1, max_length=16)
    ]


class Authentication(Model):
    """How clients prove who they are. Nothing: the operator makes one key, Secret <name>-client-keys."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                _at_most_one(("apiKeys", "jwt", "mtls", "none"), "at most one of apiKeys, jwt, mtls and none")
            ]
        }
    )

    api_keys: ApiKeys | None = None
    jwt: Opaque | None = None
    mtls: Opaque | None = None
    none: Annotated[str, Field(min_length=10, max_length=500, pattern=r"^I accept .*$")] | None = Field(
        None, description="No authentication: say why, beginning with `I accept `. Shown in status."
    )


class Tls(Model):
    """The gateway's server certificate. Nothing: an own CA, Secret <name>-gateway-tls with ca.crt."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                _at_most_one(("secretName", "disabled"), "at most one of secretName and disabled")
            ]
        }
    )

    secret_name: DnsName | None = Field(None, description="A kubernetes.io/tls Secret, as cert-manager makes it.")
    hostnames: Annotated[tuple[DnsName, ...], Field(json_schema_extra=_list(set_=True))] = Field(
        (), description="Further names of the certificate that the operator makes."
    )
    disabled: Why | None = Field(None, description="Plain HTTP: say why. Shown in status.")


class Limits(Model):
    """Limits of the gateway, per gateway pod."""

    request_body: Quantity = Field("64Mi", description="Largest request body; larger ones get 413.")
    requests_per_second_per_client: Annotated[int, Field(ge=1, le=100000)] = 100
    stream_seconds: Annotated[int, Field(ge=1, le=86400)] = Field(3600, description="Longest answer.")
    idle_seconds: Annotated[int, Field(ge=1, le=86400)] = Field(600, description="Longest silence within an answer.")
    connections: Annotated[int, Field(ge=1, le=1000000)] = 8192


class GatewayService(Model):
    """The Service that clients use."""

    type: Literal["ClusterIP", "LoadBalancer", "NodePort"] = Field("ClusterIP")
    annotations: Annotated[dict[LabelKey, Annotated[str, Field(max_length=1024)]], Field(max_length=16)] = Field(
        default_factory=dict
    )


class PodDisruptionBudgetSpec(Model):
    """policy/v1 PodDisruptionBudget of the gateway."""

    max_unavailable: Annotated[int, Field(ge=0, le=64)] = 1


class GatewaySpec(Model):
    """The Envoy in front of the engines: the only way in."""

    replicas: Annotated[int, Field(ge=0, le=64, json_schema_extra=CRD_DEFAULT)] = 2
    routes: Routes = Field(default_factory=Routes)
    authentication: Authentication = Field(default_factory=Authentication)
    tls: Tls = Field(default_factory=Tls)
    clients: Peers | None = Field(None, description="Who may connect. Absent: pods of the same namespace.")
    limits: Limits = Field(default_factory=Limits)
    service: GatewayService = Field(default_factory=GatewayService)
    resources: Resources | None = None
    autoscaling: Opaque | None = None
    pod_disruption_budget: PodDisruptionBudgetSpec = Field(default_factory=PodDisruptionBudgetSpec)


# ---------------------------------------------------------------------------------------------------------- security


class Media(Model):
    """Media URLs in requests: the engine would fetch them (server-side request forgery)."""

    allowed_domains: Annotated[tuple[DnsName, ...], Field(json_schema_extra=_list(set_=True))] = Field(
        (), description="--allowed-media-domains. Empty: none."
    )
    allow_redirects: bool = Field(False, description="VLLM_MEDIA_URL_ALLOW_REDIRECTS.")


class EgressPort(Model):
    """One destination port."""

    port: Annotated[int, Field(ge=1, le=65535)]
    protocol: Literal["TCP", "UDP"] = "TCP"


class EgressRule(Model):
    """One destination that engines may reach."""

    to: Peers
    ports: Annotated[tuple[EgressPort, ...], Field(json_schema_extra=_list(), min_length=1)]
    why: Why


class Metrics(Model):
    """Who may scrape the engines' metrics."""

    from_: Annotated[Peers, Field(alias="from")]


class Gate(Model):
    """The gate that holds an engine back until isolation was observed."""

    disabled: Why | None = None


class Acceptance(Model):
    """A risk that is taken in words; shown in status."""

    risk: Literal["vllmVersionBelowFloor"] = Field(description="Which risk.")
    why: Why


class Verification(Model):
    """How isolation is measured."""

    mode: Literal["Enforce", "Report", "Off"] = "Report"
    interval: Duration = "5m"


class Security(Model):
    """Every exception from the closed default, each in words."""

    media: Media = Field(default_factory=Media)
    egress: Annotated[tuple[EgressRule, ...], Field(json_schema_extra=_list(limit=16))] = ()
    metrics: Metrics | None = None
    gate: Gate = Field(default_factory=Gate)
    accept: Annotated[tuple[Acceptance, ...], Field(json_schema_extra=_list(key="risk", limit=16))] = ()
    verification: Verification = Field(default_factory=Verification)


# ---------------------------------------------------------------------------------------------------------- resource


class VllmVersion(Model):
    """The vLLM version of an image whose tag does not say it."""

    assume: Annotated[str, Field(max_length=32, pattern=r"^v?[0-9]{1,4}\.[0-9]{1,4}(\.[0-9]{1,4})?$")] = Field(
        description="For example 0.33.0."
    )


class Spec(Model):
    """What the user wants."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
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
            ]
        }
    )

    model: ModelSpec
    image: Image = Field(description="Image of vLLM; the version is read from its tag, or said in vllmVersion.")
    vllm_version: VllmVersion | None = None
    image_pull_secrets: Annotated[tuple[SecretRef, ...], Field(json_schema_extra=_list(key="name", limit=8))] = ()
    replicas: Annotated[int, Field(ge=0, le=512, json_schema_extra=CRD_DEFAULT)] = Field(
        1, description="Model replicas."
    )
    parallelism: Parallelism = Field(default_factory=Parallelism)
    disaggregation: Disaggregation | None = None
    ports: Ports = Field(default_factory=Ports)
    engine: EngineSpec = Field(default_factory=EngineSpec)
    suspend: bool = Field(False, description="Scale to nothing; policies are kept.")
    update_policy: Literal["WithSpec", "Always"] = Field(
        "WithSpec", description="WithSpec: an operator upgrade restarts no engine; it is shown as Outdated."
    )
    gateway: GatewaySpec = Field(default_factory=GatewaySpec)
    security: Security = Field(default_factory=Security)


class Condition(Model):
    """meta/v1 Condition."""

    type: Annotated[str, Field(max_length=316)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(max_length=1024)]
    message: Annotated[str, Field(max_length=32768)]
    last_transition_time: Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})]
    observed_generation: int | None = None


class Status(Model):
    """What the operator saw."""

    observed_generation: int | None = None
    replicas: int | None = Field(None, description="Model replicas that exist.")
    ready_replicas: int | None = Field(None, description="Model replicas that serve.")
    selector: Annotated[str, Field(max_length=1024)] | None = Field(
        None, description="Selects exactly one pod per model replica (scale subresource)."
    )
    url: Annotated[str, Field(max_length=1024)] | None = None
    vllm_version: Annotated[str, Field(max_length=64)] | None = None
    last_verified: Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})] | None = None
    outdated: Annotated[tuple[Annotated[str, Field(max_length=253)], ...], Field(json_schema_extra=_list())] = Field(
        (), description="Workloads whose template a newer operator would change; rolled with the next change of spec."
    )
    accepted_risks: Annotated[
        tuple[Annotated[str, Field(max_length=1024)], ...], Field(json_schema_extra=_list(limit=64))
    ] = Field((), description="What the spec gave up, in its own words.")
    conditions: Annotated[tuple[Condition, ...], Field(json_schema_extra=_list(key="type", limit=16))] = ()
