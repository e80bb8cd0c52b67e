"""What was accepted is kept under a seal: changed by somebody else, it counts as lost."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import pytest

from securevllm.render.accepted import GroupMemory, Kept, Pin, config_map, read, settle
from securevllm.render.meta import Owner, digest

OWNER = Owner("llama", "apps", "uid-1")
KEY = b"k" * 32
SPEC = {"image": "a:v0.33.0", "replicas": 2}
KEPT = Kept(SPEC, {"engine": Pin("abc", {"spec": {"containers": []}})})
OLD: dict[str, Any] = {"spec": {"containers": [{"image": "old"}]}}
NEW: dict[str, Any] = {"spec": {"containers": [{"image": "new"}]}}


def data() -> dict[str, str]:
    found: dict[str, str] = config_map(OWNER, KEPT, KEY)["data"]
    return found


def test_it_is_read_back() -> None:
    assert config_map(OWNER, KEPT, KEY)["metadata"]["name"] == "llama-accepted"
    assert read(OWNER, data(), KEY) == KEPT


@pytest.mark.parametrize("name", ["spec.json", "templates.json", "seal"])
@pytest.mark.parametrize("value", ["", "{}", "\u00e9", "x" * 64, None])
def test_every_tampering_is_refused(name: str, value: str | None) -> None:
    changed = data()
    if value is None:
        del changed[name]
    else:
        changed[name] = value
    assert read(OWNER, changed, KEY) is None


def test_one_character_is_enough() -> None:
    for name, text in data().items():
        for index in (0, len(text) // 2, len(text) - 1):
            other = "0" if text[index] != "0" else "1"
            assert read(OWNER, {**data(), name: text[:index] + other + text[index + 1 :]}, KEY) is None


def test_text_cannot_move_between_the_parts() -> None:
    whole = data()
    spec, templates = whole["spec.json"], whole["templates.json"]
    assert read(OWNER, {**whole, "spec.json": spec[:-1], "templates.json": spec[-1] + templates}, KEY) is None
    assert read(OWNER, {**whole, "spec.json": spec + templates, "templates.json": ""}, KEY) is None
    assert read(OWNER, {**whole, "spec.json": templates, "templates.json": spec}, KEY) is None
    assert read(Owner("llama", "apps", "uid-1{"), {**whole, "spec.json": spec[1:]}, KEY) is None


def test_it_belongs_to_one_resource_and_one_key() -> None:
    assert read(Owner("llama", "apps", "uid-2"), data(), KEY) is None
    assert read(OWNER, data(), b"another") is None
    assert read(OWNER, {}, KEY) is None


def test_nothing_of_the_key_is_shown() -> None:
    assert "kkkk" not in str(config_map(OWNER, KEPT, KEY))


# ------------------------------------------------------------------------------------------- pinned templates, I11


def test_the_first_template_is_the_fresh_one() -> None:
    settled = settle(NEW, {"a": 1}, None, "WithSpec")
    assert (settled.pin, settled.outdated) == (Pin(digest({"a": 1}), NEW), False)


def test_another_rendering_of_the_same_inputs_is_only_reported() -> None:
    pin = settle(OLD, {"a": 1}, None, "WithSpec").pin
    settled = settle(NEW, {"a": 1}, pin, "WithSpec")
    assert (settled.pin.template, settled.outdated) == (OLD, True)
    assert not settle(OLD, {"a": 1}, pin, "WithSpec").outdated


def test_a_change_of_the_inputs_rolls() -> None:
    pin = settle(OLD, {"a": 1}, None, "WithSpec").pin
    settled = settle(NEW, {"a": 2}, pin, "WithSpec")
    assert (settled.pin, settled.outdated) == (Pin(digest({"a": 2}), NEW), False)


def test_always_rolls() -> None:
    pin = settle(OLD, {"a": 1}, None, "Always").pin
    settled = settle(NEW, {"a": 1}, pin, "Always")
    assert (settled.pin.template, settled.outdated) == (NEW, False)


def test_a_pin_of_an_earlier_release_is_known_and_stays_as_it_is() -> None:
    pin = Pin(digest({"a": 1, "b": None}), OLD)
    settled = settle(NEW, {"a": 1}, pin, "WithSpec", before=[{"a": 1, "b": None}])
    assert (settled.pin, settled.outdated) == (pin, True)
    assert settle(NEW, {"a": 1}, pin, "WithSpec").pin.template == NEW
    assert settle(NEW, {"a": 1}, pin, "Always", before=[{"a": 1, "b": None}]).pin.template == NEW


# ----------------------------------------------------------------------------------------- written by a newer release


def test_what_a_newer_release_remembers_of_a_group_beside_is_left_out() -> None:
    memory = GroupMemory(epoch=3, since=7, restarts=1, members=("a", "b"), why="it broke")
    content = config_map(OWNER, Kept(SPEC, {}, {"e0": memory}), KEY)["data"]
    groups = json.loads(content["groups.json"])
    groups["e0"] |= {"rack": "b12", "members": [*groups["e0"]["members"]]}
    assert read(OWNER, sealed({**content, "groups.json": json.dumps(groups)}), KEY) == Kept(SPEC, {}, {"e0": memory})


def test_a_field_that_an_earlier_release_did_not_remember_has_its_default() -> None:
    content = config_map(OWNER, Kept(SPEC, {}, {"e0": GroupMemory()}), KEY)["data"]
    kept = read(OWNER, sealed({**content, "groups.json": '{"e0": {"epoch": 4}}'}), KEY)
    assert kept is not None
    assert kept.groups == {"e0": GroupMemory(epoch=4)}


def sealed(content: dict[str, str]) -> dict[str, str]:
    """The same content under a valid seal, as a release that writes it would have it."""
    texts = [content[name] for name in ("spec.json", "templates.json", "groups.json") if name in content]
    message = b"".join(len(text.encode()).to_bytes(8, "big") + text.encode() for text in (OWNER.uid, *texts))
    return {**content, "seal": hmac.new(KEY, message, hashlib.sha256).hexdigest()}
