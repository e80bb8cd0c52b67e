"""A SecureVLLMDeployment for a workload that runs vLLM: what can be carried over, and in words what cannot.

The parser is the judge: what it refuses is taken out again and told, so that what is printed is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from securevllm import catalogue
from securevllm.api import types as api
from securevllm.api.guard import arguments, pod
from securevllm.api.parse import parse
from securevllm.check.command import Flag, last_values
from securevllm.check.workloads import mappings
from securevllm.errors import Problem, SpecError

if TYPE_CHECKING:
    from securevllm.check.findings import Seen
    from securevllm.check.workloads import Part

_TRIES = 64
_UNKNOWN_MODEL = "owner/model"
_PLACE = ("nodeSelector", "tolerations", "priorityClassName", "runtimeClassName", "schedulerName")
_PROFILES = {"embed": "embeddings", "token_embed": "embeddings", "score": "score", "transcription": "audio"}
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a mount point
_SILENT = frozenset(
    {"--host", "--port", "--model", "--uvicorn-log-level", "--node-rank", "--master-addr", "--headless"}
)


@dataclass(frozen=True)
class Suggestion:
    """A resource that the parser accepts, and what it does not carry over."""

    object: dict[str, Any]
    notes: tuple[str, ...]


def suggest(seen: Seen) -> Suggestion | None:
    """Make a resource; None: nothing of the workload serves, or its essentials cannot be carried over."""
    part = seen.workload.server
    if part is None:
        return None
    notes: list[str] = []
    name = _name(seen.workload.name)
    spec = _spec(seen, part, notes)
    dropped: list[str] = []
    for _ in range(_TRIES):
        try:
            parse(name, spec)
        except SpecError as error:
            if not any(_drop(spec, problem, dropped) for problem in error.problems):
                return None
            continue
        notes += dropped
        metadata = {"name": name, "namespace": seen.workload.namespace}
        made = {"apiVersion": api.API_VERSION, "kind": api.KIND, "metadata": metadata, "spec": spec}
        return Suggestion(made, tuple(dict.fromkeys(notes)))
    return None


def _name(name: str) -> str:
    cleaned = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    cleaned = cleaned if cleaned[:1].isalpha() else f"vllm-{cleaned}"
    return cleaned[: api.NAME_LIMIT].strip("-")


def _spec(seen: Seen, part: Part, notes: list[str]) -> dict[str, Any]:
    flags = last_values(part.launch.flags)
    replicas = seen.workload.replicas
    parallelism = _parallelism(seen, flags)
    pods = replicas * int(parallelism.get("nodes", 1))
    spec: dict[str, Any] = {
        "model": _model(part, flags, pods, notes),
        "image": _image(seen, part, notes),
    }
    secrets = [{"name": item["name"]} for item in mappings(part.spec.get("imagePullSecrets")) if item.get("name")]
    if secrets:
        spec["imagePullSecrets"] = secrets
    if replicas != 1:
        spec["replicas"] = replicas
    if parallelism:
        spec["parallelism"] = parallelism
    version = seen.claimed if spec["image"] == part.image and seen.claimed else catalogue.newest()
    engine = _engine(part, flags, version, notes)
    if engine:
        spec["engine"] = engine
    task = next((flags[name].value for name in ("--task", "--convert") if name in flags), "")
    profile = "embeddings" if "--runner" in flags and flags["--runner"].value == "pooling" else _PROFILES.get(task)
    if profile:
        spec["gateway"] = {"routes": {"profiles": [profile]}}
    return spec


def _model(part: Part, flags: Mapping[str, Flag], pods: int, notes: list[str]) -> dict[str, Any]:
    name = part.launch.model
    if not re.fullmatch(r"[A-Za-z0-9/._-]+", name):
        notes.append(f"model.name: {name[:60]!r} cannot be carried over: write the repository's name")
        name = _UNKNOWN_MODEL
    model: dict[str, Any] = {"name": name}
    served = flags.get("--served-model-name")
    if served is not None and served.value:
        model["servedName"] = served.value
        if len(served.values) > 1:
            notes.append(f"--served-model-name: only the first of {len(served.values)} names")
    claim = _claim(part, name) if name.startswith("/") else None
    if claim is not None:
        model |= {"name": name.rpartition("/")[2] or "model", "source": {"persistentVolumeClaim": claim}}
    elif not name.startswith("/"):
        revision = flags.get("--revision")
        if revision is not None and revision.value:
            model["revision"] = revision.value
        model["source"] = {"huggingFace": _hub(part, pods)}
    return model


def _claim(part: Part, path: str) -> dict[str, str] | None:
    """The claim that a path of the model lies in."""
    claims = {
        str(volume.get("name")): claim.get("claimName")
        for volume in mappings(part.spec.get("volumes"))
        if isinstance(claim := volume.get("persistentVolumeClaim"), Mapping)
    }
    for mount in mappings(part.container.get("volumeMounts")):
        folder, name = str(mount.get("mountPath") or "").rstrip("/"), claims.get(str(mount.get("name")))
        if name and folder and (path == folder or path.startswith(f"{folder}/")):
            below = "/".join(filter(None, (str(mount.get("subPath") or ""), path[len(folder) :].strip("/"))))
            return {"claimName": str(name), **({"path": below} if below else {})}
    return None


def _hub(part: Part, pods: int) -> dict[str, Any]:
    hub: dict[str, Any] = {}
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        variable = part.launch.variables.get(name)
        kind, _, reference = variable.source.partition(" ") if variable is not None else ("", "", "")
        if kind == "secret":
            secret, _, key = reference.partition("/")
            hub["tokenSecretRef"] = {"name": secret, "key": key}
            break
    if pods > 1:
        hub["storage"] = {"accessModes": ["ReadWriteMany"]}
    return hub


def _image(seen: Seen, part: Part, notes: list[str]) -> str:
    newest = f"vllm/vllm-openai:v{catalogue.newest()}"
    if seen.claimed is None:
        notes.append(f"image: {part.image} does not say its version; {newest} instead")
        return newest
    if not catalogue.floor() <= seen.claimed <= catalogue.newest():
        notes.append(f"image: {newest} instead of vLLM {seen.claimed}")
        return newest
    return part.image


def _parallelism(seen: Seen, flags: Mapping[str, Flag]) -> dict[str, Any]:
    def number(name: str) -> int:
        flag = flags.get(name)
        return int(flag.value) if flag is not None and re.fullmatch(r"[1-9][0-9]{0,3}", flag.value) else 1

    found: dict[str, Any] = {}
    for field, name in (("tensor", "--tensor-parallel-size"), ("pipeline", "--pipeline-parallel-size")):
        if number(name) > 1:
            found[field] = number(name)
    template = seen.workload.object.get("spec", {}).get("leaderWorkerTemplate", {})
    size = template.get("size", 1) if isinstance(template, Mapping) else 1
    nodes = max(number("--nnodes"), size if isinstance(size, int) else 1)
    data = number("--data-parallel-size")
    if data > 1:
        local = number("--data-parallel-size-local")
        found["data"] = {"size": data, **({"sizeLocal": local} if "--data-parallel-size-local" in flags else {})}
    if nodes > 1:
        found["nodes"] = nodes
    if "--enable-expert-parallel" in flags:
        found["expert"] = True
    return found


def _engine(part: Part, flags: Mapping[str, Flag], version: catalogue.Version, notes: list[str]) -> dict[str, Any]:
    engine: dict[str, Any] = {}
    args = list(_arguments(flags, version, notes))
    env = [
        {"name": name, "value": variable.value}
        for name, variable in part.launch.variables.items()
        if name in catalogue.environment().allowed and variable.value is not None
    ]
    resources = _resources(part, notes)
    engine |= {name: value for name, value in (("args", args), ("env", env), ("resources", resources)) if value}
    engine |= {name: part.spec[name] for name in _PLACE if part.spec.get(name)}
    shared = _shared_memory(part)
    if shared is not None:
        engine["sharedMemory"] = shared
    return engine


def _resources(part: Part, notes: list[str]) -> dict[str, dict[str, int | str]]:
    found: dict[str, dict[str, int | str]] = {}
    for kind in ("requests", "limits"):
        amounts = _get(part.container, "resources", kind)
        for name, value in amounts.items() if isinstance(amounts, Mapping) else ():
            if name in {"cpu", "memory", "ephemeral-storage"} or pod.is_gpu(str(name)):
                found.setdefault(kind, {})[str(name)] = value
            else:
                notes.append(f"resources.{kind} {str(name)[:60]}: may bring a network that no NetworkPolicy sees")
    return found


def _arguments(flags: Mapping[str, Flag], version: catalogue.Version, notes: list[str]) -> Iterator[str]:
    known = catalogue.flags()
    for name, flag in flags.items():
        text = f"{name}={flag.value}" if flag.values else name
        if name in known.owned:
            # What has a field of its own is carried over there, or is none of the user's business.
            if name in {"--kv-transfer-config", "--kv-events-config", "--allowed-media-domains"}:
                notes.append(f"{name}: use {known.owned[name]}")
            continue
        if name in _SILENT:
            continue
        problems = [*arguments.check([text], version, mounts=(), accepted=())]
        if problems:
            notes.append(f"{text[:60]}: {problems[0].rule}")
        else:
            yield text


def _shared_memory(part: Part) -> str | None:
    mounts = mappings(part.container.get("volumeMounts"))
    names = {str(mount.get("name")) for mount in mounts if mount.get("mountPath") == _SHARED_MEMORY}
    for volume in mappings(part.spec.get("volumes")):
        size = _get(volume, "emptyDir", "sizeLimit")
        if str(volume.get("name")) in names and size is not None:
            return str(size)
    return None


def _get(obj: Mapping[str, Any], *path: str) -> Any:
    found: Any = obj
    for part in path:
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _drop(spec: dict[str, Any], problem: Problem, dropped: list[str]) -> bool:
    """Take the refused field out; False: it is one without which nothing is left."""
    path = re.findall(r"[^.\[\]]+", problem.field)[1:]
    while path:
        holder: Any = spec
        for part in path[:-1]:
            holder = _step(holder, part)
        last = int(path[-1]) if path[-1].isdigit() and isinstance(holder, list) else path[-1]
        if path[0] in {"model", "image"} and len(path) < 3:  # noqa: PLR2004 - spec.model.name and the like
            return False
        if (isinstance(holder, dict) and last in holder) or (
            isinstance(holder, list) and isinstance(last, int) and last < len(holder)
        ):
            del holder[last]
        else:
            path.pop()
            continue
        dropped.append(f"{problem.field.removeprefix('spec.')}: {problem.rule}")
        return True
    return False


def _step(holder: Any, part: str) -> Any:
    if isinstance(holder, list):
        return holder[int(part)] if part.isdigit() and int(part) < len(holder) else None
    return holder.get(part) if isinstance(holder, Mapping) else None
