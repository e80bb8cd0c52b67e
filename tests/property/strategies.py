"""Valid specs of every topology, as a user would write them: JSON, most fields absent.

Selectors and addresses come from small pools, so that they meet the pods and the outside addresses of `world`.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

JsonMap = dict[str, Any]

NAMES = ("llama", "a", "q" * 40)
LABELS = {"app": ("web", "batch"), "team": ("red", "blue")}
CIDRS = (
    "0.0.0.0/0",
    "::/0",
    "1.1.1.0/24",
    "1.1.1.1/32",
    "192.0.2.0/24",
    "192.0.2.128/25",
    "128.0.0.0/1",
    "2606:4700::/32",
    "2000::/3",
)
PRIVATE_CIDRS = ("10.0.0.0/8", "172.16.0.0/12", "192.168.7.0/24", "fd00::/8")
PORTS = (22, 53, 80, 443, 5432, 8000, 8080, 8443, 9901, 9902, 9903, 65535)
WHY = st.just("because this test says so")
FILES: JsonMap = {"name": "files", "mountPath": "/mnt/files", "configMap": {"name": "files"}}
PROXY: JsonMap = {
    "to": {"podSelector": {"matchLabels": {"app": "web"}}},
    "ports": [{"port": 3128}],
    "proxy": "http://squid:3128",
    "why": "because this test says so",
}


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[JsonMap]:
    """Maps with any subset of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


def _requirement(key: str) -> st.SearchStrategy[JsonMap]:
    some = st.lists(st.sampled_from(LABELS[key]), min_size=1, max_size=2, unique=True)
    listed = st.fixed_dictionaries({"key": st.just(key), "operator": st.sampled_from(["In", "NotIn"]), "values": some})
    plain = st.fixed_dictionaries({"key": st.just(key), "operator": st.sampled_from(["Exists", "DoesNotExist"])})
    return listed | plain


def selectors() -> st.SearchStrategy[JsonMap]:
    """LabelSelectors over the label pool."""
    return optional(
        matchLabels=st.fixed_dictionaries({}, optional={key: st.sampled_from(of) for key, of in LABELS.items()}),
        matchExpressions=st.lists(st.sampled_from(sorted(LABELS)).flatmap(_requirement), max_size=2),
    )


def peers(cidrs: tuple[str, ...], *, least: int = 0) -> st.SearchStrategy[JsonMap]:
    """Peers with any of their three parts; at least so many addresses."""
    addresses = st.lists(st.sampled_from(cidrs), min_size=least, max_size=3, unique=True)
    parts: dict[str, st.SearchStrategy[Any]] = {"namespaceSelector": selectors(), "podSelector": selectors()}
    if least:
        return st.fixed_dictionaries({"cidrs": addresses}, optional=parts)
    return optional(cidrs=addresses, **parts)


def somebody() -> st.SearchStrategy[JsonMap]:
    """Peers with at least one part that names somebody."""
    return peers(CIDRS).filter(lambda to: bool(to.get("cidrs") or len(to.keys() - {"cidrs"})))


def egress_rules() -> st.SearchStrategy[JsonMap]:
    """One declared egress."""
    ports = st.fixed_dictionaries(
        {"port": st.sampled_from(PORTS)}, optional={"protocol": st.sampled_from(["TCP", "UDP"])}
    )
    return st.fixed_dictionaries(
        {
            "to": somebody(),
            "ports": st.lists(ports, min_size=1, max_size=3),
            "why": WHY,
        }
    )


def _storage() -> st.SearchStrategy[JsonMap]:
    return st.just({"claimName": "shared"}) | st.fixed_dictionaries(
        {"accessModes": st.just(["ReadWriteMany"])},
        optional={"size": st.sampled_from(["1Gi", 10, "1.5Ti"]), "storageClassName": st.just("fast")},
    )


def models() -> st.SearchStrategy[JsonMap]:
    """`spec.model` with each kind of source that is rendered."""
    more = {"servedName": st.just("llama")}
    pinned = more | {"revision": st.sampled_from(["main", "0" * 40])}
    hub = st.fixed_dictionaries(
        {"storage": _storage()},
        optional={
            "tokenSecretRef": st.just({"name": "hub", "key": "token"}),
            "endpoint": st.sampled_from(["https://hub.example.com", "https://hub.example.com:8443/api"]),
        },
    )
    claim = st.fixed_dictionaries({"claimName": st.just("weights")}, optional={"path": st.just("llama/8b")})
    return st.one_of(
        st.fixed_dictionaries(
            {"name": st.just("meta-llama/Llama-3.1-8B"), "source": st.fixed_dictionaries({"huggingFace": hub})},
            optional=pinned,
        ),
        st.fixed_dictionaries(
            {"name": st.just("llama"), "source": st.fixed_dictionaries({"persistentVolumeClaim": claim})}, optional=more
        ),
        st.fixed_dictionaries({"name": st.just("/models/llama")}, optional=more),
    )


def gateways() -> st.SearchStrategy[JsonMap]:
    """`spec.gateway`; services that are open to the outside name who may connect."""
    every = (*CIDRS, *PRIVATE_CIDRS)
    fields: dict[str, st.SearchStrategy[Any]] = {
        "replicas": st.integers(0, 3),
        "routes": optional(
            profiles=st.lists(
                st.sampled_from(["chat", "embeddings", "responses", "messages", "score", "rerank", "audio"]),
                max_size=3,
                unique=True,
            ),
            allow=st.just([{"method": "POST", "path": "/v2/embed"}]),
        ),
        "authentication": st.sampled_from(
            [{}, {"none": "I accept that everybody may ask"}, {"apiKeys": {"secretRefs": [{"name": "keys"}]}}]
        ),
        "tls": st.sampled_from(
            [{}, {"secretName": "web"}, {"hostnames": ["llm.example.com"]}, {"disabled": "a mesh does it here"}]
        ),
        "limits": optional(requestBody=st.sampled_from(["1Ki", "1Mi", 4096]), streamSeconds=st.integers(1, 86400)),
        "resources": st.sampled_from([{}, {"limits": {"memory": "1Gi"}, "requests": {"cpu": 1}}]),
        "podDisruptionBudget": optional(maxUnavailable=st.integers(0, 2)),
    }
    inside = optional(clients=peers(every), **fields)
    outside = st.fixed_dictionaries(
        {
            "clients": peers(every, least=1),
            "service": st.fixed_dictionaries(
                {"type": st.sampled_from(["LoadBalancer", "NodePort"])},
                optional={"annotations": st.just({"metallb.io/ip-allocated-from-pool": "public"})},
            ),
        },
        optional=fields,
    )
    return inside | outside


def engines() -> st.SearchStrategy[JsonMap]:
    """`spec.engine`."""
    return optional(
        args=st.lists(
            st.sampled_from(
                [
                    "--enforce-eager",
                    "--max_model_len=8192",
                    "-q=fp8",
                    "--seed=-1",
                    '--speculative-config={"method": "ngram"}',
                    "--hf-overrides.num_labels=2",
                    "--chat-template=/mnt/files/chat.jinja",
                ]
            ),
            max_size=3,
            unique=True,
        ),
        env=st.sampled_from(
            [
                [],
                [{"name": "TZ", "value": "UTC"}],
                [{"name": "OTEL_SERVICE_NAME", "valueFrom": {"secretKeyRef": {"name": "otel", "key": "name"}}}],
            ]
        ),
        resources=st.sampled_from(
            [{}, {"limits": {"cpu": 4, "memory": "8Gi"}}, {"requests": {"ephemeral-storage": "1Gi"}}]
        ),
        nodeSelector=st.sampled_from([{}, {"pool": "gpu"}]),
        tolerations=st.sampled_from([[], [{"key": "nvidia.com/gpu", "operator": "Exists"}]]),
        affinity=st.sampled_from([{}, {"nodeAffinity": {}}]),
        topologySpreadConstraints=st.sampled_from(
            [[], [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]]
        ),
        priorityClassName=st.just("high"),
        schedulerName=st.just("other"),
        runtimeClassName=st.just("nvidia"),
        sharedMemory=st.sampled_from(["1Gi", 1024]),
        startupTimeout=st.sampled_from(["5s", "90m", "2h"]),
        terminationGracePeriod=st.sampled_from(["1s", "2s", "600s"]),
        labels=st.sampled_from([{}, {"app": "web", "team": "red"}]),
        annotations=st.sampled_from([{}, {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}]),
    ).map(lambda engine: engine | {"volumes": [FILES]})


MOVED = {
    "nodes": "torchDistributed",
    "data": "dataParallelRpc",
    "nixl": "nixlSideChannel",
    "kv-events": "kvEvents",
    "metrics": "metrics",
}


@st.composite
def shapes(draw: st.DrawFn) -> tuple[JsonMap, set[str]]:
    """`parallelism` that adds up, and what it opens (column `when` of the socket catalogue)."""
    tensor, pipeline = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from([1, 2]))
    found: JsonMap = {"tensor": tensor, "pipeline": pipeline}
    kind = draw(st.sampled_from(["pod", "pod", "nodes", "data in a pod", "internal", "hybrid", "external"]))
    if kind == "pod":
        return draw(st.sampled_from([found, {}, {"tensor": tensor, "expert": True} if tensor > 1 else {}])), set()
    if kind == "nodes":
        nodes = draw(st.sampled_from([count for count in (2, 4) if tensor * pipeline % count == 0] or [1]))
        return found | {"nodes": nodes}, {"nodes"} if nodes > 1 else set()
    if kind == "data in a pod":
        return found | {"data": {"size": draw(st.sampled_from([1, 2, 4]))}}, set()
    data: JsonMap = {"size": draw(st.sampled_from([2, 3])) * draw(st.sampled_from([1, 2])), "loadBalancing": kind}
    if kind == "external":
        return found | {"expert": True, "data": data | {"sizeLocal": 1}}, {"data"}
    pods = draw(st.sampled_from([count for count in (2, 3) if data["size"] % count == 0]))
    local = data["size"] // pods
    found |= draw(st.sampled_from([{"nodes": pods, "data": data}, {"data": data | {"sizeLocal": local}}]))
    return found | {"expert": draw(st.booleans())}, {"data"}


@st.composite
def topologies(draw: st.DrawFn) -> JsonMap:
    """The fields that shape a topology, with ports of what they open moved at random."""
    found: JsonMap = {}
    opened: set[str] = set()
    if draw(st.integers(0, 2)):
        shape, opened = draw(shapes())
        found = {"parallelism": shape, "replicas": draw(st.integers(0, 3))}
    else:
        sides: JsonMap = {}
        for side in ("prefill", "decode"):
            shape, more = draw(shapes().filter(lambda made: _balanced_inside(made[0])))
            sides[side] = {"replicas": draw(st.integers(0, 2)), "parallelism": shape}
            opened |= more
        connector = draw(st.sampled_from(["nixl", "mooncake"]))
        router = {"image": "vllm/vllm-router:v0.1.17", "replicas": draw(st.integers(0, 2))}
        found = {"disaggregation": {"connector": connector, "router": router, **sides}}
        opened.add(connector)
    if draw(st.booleans()):
        readers = draw(peers(CIDRS))
        found["security"] = {"kvEvents": {"from": readers, "why": draw(WHY)}}
        opened.add("kv-events")
    if draw(st.booleans()):
        found["security"] = {**found.get("security", {}), "metrics": {"from": draw(somebody())}}
        opened.add("metrics")
    moved = draw(st.sets(st.sampled_from(sorted(opened)))) if opened else set()
    found["ports"] = {MOVED[when]: 20000 + 100 * number for number, when in enumerate(sorted(moved)) if when in MOVED}
    if draw(st.booleans()):
        found["ports"]["api"] = draw(st.sampled_from([1024, 8001, 8443, 9902, 65535]))
    return found


def _balanced_inside(shape: JsonMap) -> bool:
    return bool(shape.get("data", {}).get("loadBalancing", "internal") == "internal")


def specs() -> st.SearchStrategy[JsonMap]:
    """Whole specs that `parse` accepts."""
    return st.tuples(topologies(), plain_specs()).map(_together)


def _together(parts: tuple[JsonMap, JsonMap]) -> JsonMap:
    topology, plain = parts
    security = {**plain.get("security", {}), **topology.get("security", {})}
    return {**plain, **topology, **({"security": security} if security else {})}


def plain_specs() -> st.SearchStrategy[JsonMap]:
    """Specs without what shapes the topology."""
    return st.fixed_dictionaries(
        {
            "model": models(),
            "image": st.sampled_from(["vllm/vllm-openai:v0.33.0", "reg.local:5000/v@sha256:" + "0" * 64]),
        },
        optional={
            "imagePullSecrets": st.just([{"name": "pull"}]),
            "engine": engines(),
            "suspend": st.booleans(),
            "updatePolicy": st.sampled_from(["WithSpec", "Always"]),
            "gateway": gateways(),
            "security": optional(
                media=optional(
                    allowedDomains=st.sampled_from([[], ["a.example", "b.example"]]), allowRedirects=st.booleans()
                ),
                egress=st.lists(egress_rules(), max_size=3).flatmap(
                    lambda found: st.sampled_from([found, [*found, PROXY]])
                ),
                verification=st.sampled_from([{}, {"mode": "Disabled"}]),
            ),
        },
    ).map(_with_version)


def _with_version(spec: JsonMap) -> JsonMap:
    return spec if "@" not in spec["image"] else {**spec, "vllmVersion": {"assume": "0.33.0"}}
