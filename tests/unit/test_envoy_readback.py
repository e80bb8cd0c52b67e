"""Versions from the text that Envoy 1.40 answers on the ops port."""

from __future__ import annotations

import json

import pytest

from securevllm.render.readback import parse_engine_version, parse_healthy, parse_versions, versions_of

ANSWER = """\
# TYPE envoy_cluster_manager_cds_version_text gauge
envoy_cluster_manager_cds_version_text{text_value="20bd1cee3a3c17d0"} 0
envoy_extension_config_discovery_http_filter_allowlist_version_text{text_value="331f27a6ef720cac"} 0
envoy_extension_config_discovery_http_filter_api_keys_version_text{text_value="17069246"} 0
# TYPE envoy_http_rds_version_text gauge
envoy_http_rds_version_text{envoy_rds_route_config="gateway",envoy_http_conn_manager_prefix="gateway",text_value="b5"} 0
envoy_listener_manager_lds_version_text{text_value="e03facabe31a3af2"} 0
envoy_sds_version_text{envoy_xds_resource_name="engine_key",text_value="d13bb8c68abf5486"} 0
envoy_sds_version_text{envoy_xds_resource_name="server_cert",text_value="9efaf467882badd5"} 0
"""


def test_every_file_is_found() -> None:
    assert parse_versions(ANSWER) == {
        "cds.yaml": "20bd1cee3a3c17d0",
        "rbac.yaml": "331f27a6ef720cac",
        "api_keys.yaml": "17069246",
        "rds.yaml": "b5",
        "lds.yaml": "e03facabe31a3af2",
        "engine_key_sds.yaml": "d13bb8c68abf5486",
        "sds.yaml": "9efaf467882badd5",
    }


def test_what_is_not_loaded_or_not_ours_is_absent() -> None:
    text = (
        'envoy_listener_manager_lds_version_text{text_value=""} 0\n'
        'envoy_http_rds_version_text{envoy_rds_route_config="other",text_value="1"} 0\n'
        'envoy_other_version_text{text_value="1"} 0\n'
        'envoy_sds_version_text{text_value="1"} 0\n'
        "nonsense\n"
    )

    assert parse_versions(text) == {}
    assert parse_versions("") == {}


def test_two_versions_of_one_file_are_no_version() -> None:
    line = 'envoy_listener_manager_lds_version_text{{text_value="{}"}} 0\n'

    assert parse_versions(line.format("a") + line.format("b")) == {}
    assert parse_versions(line.format("a") * 2) == {"lds.yaml": "a"}


def test_healthy_engines_are_those_of_the_engine_cluster() -> None:
    line = 'envoy_cluster_membership_healthy{{envoy_cluster_name="{}"}} {}\n'

    assert parse_healthy(line.format("self_gateway", 1) + line.format("engine", 12)) == 12
    assert parse_healthy(line.format("self_gateway", 1)) == 0


@pytest.mark.parametrize("version", ["0.33.0", "v0.33.0", "0.33.1.dev5+g1234abc.cu130"])
def test_an_engine_says_its_version(version: str) -> None:
    assert parse_engine_version(json.dumps({"version": version})) == version


@pytest.mark.parametrize(
    "answer",
    ["", "0.33.0", "null", "[]", "{}", '{"version": 1}', '{"version": ""}', '{"version": "' + "1" * 65 + '"}',
     '{"version": "0.33.0 <script>"}', '{"version": "0.33.0\\n"}', "[" * 99999],
)  # fmt: skip
def test_what_is_no_version_gets_nowhere(answer: str) -> None:
    assert parse_engine_version(answer) == ""


def test_versions_of_files_leave_out_the_bootstrap() -> None:
    assert versions_of({"lds.yaml": '{"version_info": "a"}', "bootstrap.yaml": "{}"}) == {"lds.yaml": "a"}
