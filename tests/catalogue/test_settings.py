"""Flags, variables, ports and guarded prefixes of small sources; what is computed is reported."""

from __future__ import annotations

import textwrap

from securevllm_dev.catalogue.modules import Tree
from securevllm_dev.catalogue.settings import Settings, settings
from securevllm_dev.catalogue.source import Source


def _read(**files: str) -> Settings:
    sources = {name.replace("__", "/") + ".py": textwrap.dedent(text).encode() for name, text in files.items()}
    return settings(Tree(Source(files=sources)))


def test_flags_by_name_by_description_and_in_a_loop() -> None:
    found = _read(
        vllm__config="""
            class CacheConfig:
                block_size: int = 16
                enable_prefix_caching: bool | None = True
                names: dict[str, bool] = field(default_factory=dict)
        """,
        vllm__engine__arg_utils="""
            from vllm.config import CacheConfig
            class EngineArgs:
                @staticmethod
                def add_cli_args(parser):
                    table = get_kwargs(CacheConfig)
                    parser.add_argument("--block-size", "-b", **table["block_size"])
                    parser.add_argument(
                        "--enable-prefix-caching", **{**table["enable_prefix_caching"], "default": None}
                    )
                    parser.add_argument("--names", **table["names"])
                    parser.add_argument("--quiet", action="store_true", default=False)
                    parser.add_argument("model", type=str)
        """,
        vllm__entrypoints__openai__cli_args="""
            class Base:
                host: str | None = None
                @classmethod
                def add_cli_args(cls, parser):
                    table = get_kwargs(cls)
                    for key, value in table.items():
                        parser.add_argument(f"--{key.replace('_', '-')}", **value)
            class FrontendArgs(Base):
                root_path: str | None = None
                kinds: ClassVar[int] = 3
        """,
        vllm__entrypoints__cli__bench="""
            parser.add_argument("--not-of-serve")
        """,
    )
    assert {flag.name: (flag.type, flag.default) for flag in found.flags} == {
        "--block-size": ("int", "16"),
        "--enable-prefix-caching": ("bool | None", "None"),
        "--no-enable-prefix-caching": ("bool | None", "None"),
        "--names": ("dict[str, bool]", "dict"),
        "--quiet": ("flag", "False"),
        "--host": ("str | None", "None"),
        "--root-path": ("str | None", "None"),
    }
    assert found.unreadable == []


def test_flag_with_a_computed_name_is_reported() -> None:
    found = _read(vllm__engine__arg_utils='parser.add_argument(prefix + "-secret")\nparser.add_argument(*names)\n')
    assert found.flags == []
    assert [(place.where, place.kind) for place in found.unreadable] == [
        ("vllm/engine/arg_utils.py:1", "flag by name"),
        ("vllm/engine/arg_utils.py:2", "flag by name"),
    ]


def test_variables_and_what_hides_one() -> None:
    found = _read(
        vllm__envs="""
            if TYPE_CHECKING:
                VLLM_A: int = 5
            environment_variables: dict[str, Callable] = {
                "VLLM_A": lambda: 5,
                "VLLM_B": lambda: 6,
                NAME: lambda: 7,
                **more,
            }
            environment_variables.update(others)
            environment_variables["VLLM_C"] = print
        """
    )
    assert [(one.name, one.type, one.default) for one in found.environment] == [
        ("VLLM_A", "int", "5"),
        ("VLLM_B", "", ""),
    ]
    assert [place.kind for place in found.unreadable] == ["variable by name"] * 4


def test_ports() -> None:
    found = _read(
        vllm__config__parallel="""
            master_port: int = 29501
            rpc: int = dict(rpc_port=29550)
            data_port: int = Field(default=29560, ge=1)
            endpoint = "tcp://*:5557"
            # old_port = 1234
            important = 4000
            ports_base = 4001
            port = 80
            table = {"http_port": 8080}
        """,
        vllm__model_executor__x="port = 9999\n",
    )
    assert {(port.name, port.number) for port in found.ports} == {
        ("master_port", 29501),
        ("rpc_port", 29550),
        ("data_port", 29560),
        ("tcp://*", 5557),
        ("http_port", 8080),
        ("ports_base", 4001),
    }


def test_guarded_prefixes_and_a_computed_one() -> None:
    found = _read(
        vllm__entrypoints__auth="""
            PREFIXES = ("/v1", "/v2")
            class AuthenticationMiddleware:
                def a(self, path): return path.startswith(PREFIXES)
                def b(self, path): return path.startswith("/three")
                def c(self, path): return path.startswith(prefixes())
            class Other:
                def d(self, path): return path.startswith("/other")
        """
    )
    assert found.guarded == {"/v1", "/v2", "/three"}
    assert [place.kind for place in found.unreadable] == ["guarded prefix"]
