"""A golden case: a resource, perhaps what was observed, and everything that the core makes of both, as readable text.

A case is one YAML file: a SecureVLLMDeployment, and as an optional second document

* ``clusterRanges`` of the `Context`, ``clientKeys``: client id to key, ``fetched``: the fetch Job is complete,
* ``groups``: what is remembered of each,
* ``pins``: workload name to fields that its pinned template differs in (I11), ``restartAt``,
* ``facts``: fields of `Facts` for ``status.yaml``; absent: no status.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from securevllm import explain
from securevllm.api.parse import Accepted, parse
from securevllm.context import Context
from securevllm.render import Observed, Rendered, accepted, envoy, fetch, render, sidecar, vllm
from securevllm.render.envoy import ClientKey
from securevllm.render.meta import EPOCH_LABEL, TEMPLATE_LABEL, Object, Owner
from securevllm.status import Facts, Fetch, Gateway, Workload, status

HERE = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in (HERE / "cases").glob("*.yaml")))
NOW = "2026-01-02T03:04:05Z"
_WIDTH = 120


@dataclass(frozen=True)
class Case:
    """A case, judged and rendered."""

    owner: Owner
    accepted: Accepted
    context: Context
    rendered: Rendered
    second: Mapping[str, Any]


@cache
def load(name: str) -> Case:
    """Read and render a case.

    Raises:
        SpecError: the case is not a valid resource.
    """
    documents = list(yaml.safe_load_all((HERE / "cases" / f"{name}.yaml").read_text(encoding="utf-8")))
    resource, second = documents[0], documents[1] if len(documents) > 1 else {}
    metadata = resource["metadata"]
    owner = Owner(metadata["name"], metadata["namespace"], f"uid-of-{metadata['name']}")
    judged = parse(owner.name, resource["spec"])
    context = Context(cluster_ranges=tuple(second.get("clusterRanges", ())))
    observed = Observed(
        client_keys=tuple(ClientKey(client, key) for client, key in second.get("clientKeys", {}).items()),
        fetched=frozenset({fetch.job_name(owner, judged.spec)}) if second.get("fetched") else frozenset(),
        restart_at=second.get("restartAt", ""),
        seal_key=b"the seal of golden cases",
        groups={name: accepted.GroupMemory(**memory) for name, memory in second.get("groups", {}).items()},
    )
    if second.get("pins"):
        observed = replace(observed, pins=_pins(owner, render(owner, judged, context, observed), second["pins"]))
    return Case(owner, judged, context, render(owner, judged, context, observed), second)


def _pins(owner: Owner, fresh: Rendered, changes: Mapping[str, Any]) -> dict[str, accepted.Pin]:
    """The pins of an older release: today's templates, with other fields in their container."""
    kept = accepted.read(owner, fresh.configuration[0]["data"], b"the seal of golden cases")
    if kept is None:
        raise AssertionError("the rendered ConfigMap has no valid seal")
    pins = dict(kept.pins)
    for name, fields in changes.items():
        template = json.loads(json.dumps(pins[name].template))
        template["spec"]["containers"][0].update(fields)
        pins[name] = replace(pins[name], template=template)
    return pins


def files(case: Case) -> dict[str, str]:
    """Relative path to text of everything that is compared."""
    made = case.rendered
    beside = _sidecar(made)
    texts = {
        "objects.yaml": "".join(f"---\n{_yaml(_without(obj, beside))}" for obj in _shown(made)),
        "explain.txt": explain.text(explain.view(case.owner, case.accepted, case.context)),
        "rendered.txt": "".join(f"{line}\n" for line in _rest(made)),
    }
    for file, text in {**made.gateway_files, "api_keys.yaml": made.keys_file, envoy.SIDECAR_FILE: beside}.items():
        if text:
            texts[f"envoy/{file}"] = _yaml(json.loads(text))
    if "facts" in case.second:
        texts["status.yaml"] = _yaml(status(_facts(case), {}, NOW))
    return texts


def _sidecar(made: Rendered) -> str:
    """The configuration of the metrics sidecars, the same in all of them; empty: there are none."""
    found = {
        container["args"][1]
        for obj in (*made.workloads, *made.withheld)
        for container in obj["spec"]["template"]["spec"]["containers"]
        if container["name"] == sidecar.NAME
    }
    return found.pop() if len(found) == 1 else ""


def _without(value: Any, text: str) -> Any:
    """JSON data with a long text replaced by the file that shows it."""
    if isinstance(value, dict):
        return {name: _without(item, text) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without(item, text) for item in value]
    return f"(envoy/{envoy.SIDECAR_FILE})" if text and value == text else value


def _rest(made: Rendered) -> Iterator[str]:
    """What is neither an object nor part of the picture."""
    yield f"selector {made.selector}"
    yield from (f"group {item.group.name} template {item.template} epoch {item.epoch}" for item in made.groups)
    yield from (f"withheld {obj['kind']} {obj['metadata']['name']}" for obj in made.withheld)
    yield from (f"outdated {name}" for name in made.outdated)


def _shown(made: Rendered) -> Iterator[Object]:
    """Objects in apply order. Envoy's files stand in `envoy/`, so their place in ConfigMap and Secret holds a note."""
    yield made.deny
    yield from made.isolation
    yield from (item.object for item in made.generated)
    for obj in (*made.configuration, *made.workloads):
        shown = dict(obj)
        for field in ("data", "stringData"):
            if field in shown:
                shown[field] = {key: _readable(key, text, made) for key, text in shown[field].items()}
        yield shown


def _readable(key: str, text: str, made: Rendered) -> Any:
    if key == "seal":
        return "(HMAC of the above)"
    if key == "templates.json":
        pins = json.loads(text)
        return {name: {**pin, "template": _pinned(name, pin["template"], made)} for name, pin in pins.items()}
    if key.endswith(".json"):
        return json.loads(text)
    return f"(envoy/{key})"


def _pinned(name: str, template: Object, made: Rendered) -> Any:
    """A pinned template, or a note where it is shown already: a group's differ from it by what was filled in."""
    role, member = name.partition("/")[0], int(name.endswith("/others"))
    for group in made.groups:
        if group.group.role == role:
            shown = json.loads(json.dumps(group.workloads[member]["spec"]["template"]))
            for label in (TEMPLATE_LABEL, EPOCH_LABEL):
                del shown["metadata"]["labels"][label]
            ranks = int(name.split("/")[1].partition("x")[2])
            filled = vllm.fill(template, group.group.name, member, member * ranks)
            return "(as in its StatefulSets)" if filled == shown else template
    for obj in made.workloads:
        if obj["metadata"]["labels"]["app.kubernetes.io/component"] == role and obj["spec"]["template"] == template:
            return "(as in its Deployment)"
    return template


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, width=_WIDTH, allow_unicode=True))


def _facts(case: Case) -> Facts:
    given = dict(case.second["facts"])
    for field, model in (("engine", Workload), ("gateway", Workload), ("fetch", Fetch), ("served", Gateway)):
        if given.get(field) is not None:
            given[field] = model(**given[field])
    made = case.rendered
    return Facts(
        generation=3,
        suspended=case.accepted.spec.suspend,
        outdated=made.outdated,
        risks=case.accepted.risks,
        url=made.url,
        selector=made.selector,
        version=str(case.accepted.version),
        verification=case.accepted.spec.security.verification.mode,
        **given,
    )
