"""Text to objects: bad input is named with its line, and everything else is read."""

from __future__ import annotations

import time

import pytest

from securevllm.check.documents import MAX_BYTES, MAX_DEPTH, MAX_DOCUMENTS, Document, Wrong, read

POD = "{apiVersion: v1, kind: Pod, metadata: {name: a}}"


def split(text: str) -> tuple[list[Document], list[str]]:
    found = list(read("f.yaml", text))
    return (
        [item for item in found if isinstance(item, Document)],
        [str(item) for item in found if isinstance(item, Wrong)],
    )


def test_objects_know_their_line() -> None:
    text = f"# comment\n---\n{POD}\n--- # another\napiVersion: v1\nkind: Service\n...\n---\n"
    found, wrong = split(text)
    assert [(item.object["kind"], item.source.line) for item in found] == [("Pod", 2), ("Service", 4)]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "is not YAML"),
        ("a: b\n  c: d: e", "f.yaml:2: is not YAML"),
        ("\t- a", "is not YAML"),
        ("a: !!python/object:os.system x", "is not YAML: could not determine a constructor"),
        ("? [a, b]\n: c", "is not YAML"),
        ("a: 2026-02-30", "is not YAML: ValueError"),
        ("a: *b", "is not YAML: found undefined alias"),
        ("a: \x00", "is not YAML"),
        ("a: \ufffd\x01", "is not YAML"),
        ("text", "holds a text, not a Kubernetes object"),
        ("- a", "holds a list, not a Kubernetes object"),
        ("1", "holds int, not a Kubernetes object"),
        ("a: b", "apiVersion and kind are required"),
        ("{apiVersion: v1, kind: [Pod]}", "apiVersion and kind are required"),
        ("{apiVersion: v1, kind: Pod, metadata: x}", "Pod: metadata is a text, not a mapping"),
        ("{apiVersion: v1, kind: Pod, spec: [1]}", "Pod: spec is a list, not a mapping"),
        ("{apiVersion: v1, kind: Pod, metadata: {name: 1}}", "Pod: metadata.name is int, not a text"),
        ("{apiVersion: v1, kind: List, items: x}", "items is a text, not a list"),
        ("[" * (MAX_DEPTH + 1), f"is nested deeper than {MAX_DEPTH} levels"),
        ("[" * 1_000_000, "nest"),
        ("- " * 100_000 + "a", f"is nested deeper than {MAX_DEPTH} levels"),
        ("\n".join(" " * depth + "a:" for depth in range(100)), f"is nested deeper than {MAX_DEPTH} levels"),
        ("a: &a [*a]", "aliases repeat them"),
        ("&a {b: *a, apiVersion: v1, kind: Pod}", "aliases repeat them"),
        ("", "holds no object"),
        ("# nothing\n---\n", "holds no object"),
    ],
)
def test_bad_input_is_named_and_hides_nothing(text: str, told: str) -> None:
    found, wrong = split(text)
    assert found == []
    assert len(wrong) == 1
    assert told in wrong[0]
    if text.strip("# \n-nothig"):
        found, wrong = split(f"{POD}\n---\n{text}\n---\n{POD}")
        assert len(found) == 2
        assert len(wrong) == 1


def test_an_anchor_bomb_is_refused_in_no_time() -> None:
    """Ten anchors of ten aliases each: ten thousand million values."""
    lines = ['a0: &a0 ["lol"]'] + [
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 11)
    ]
    began = time.process_time()
    _, wrong = split("\n".join([*lines, "apiVersion: v1", "kind: Pod"]))
    assert time.process_time() - began < 10
    assert "stands for more than" in wrong[0]


def test_ordinary_aliases_are_read() -> None:
    found, wrong = split("apiVersion: v1\nkind: Pod\nx: &x {a: 1}\ny: [*x, *x]")
    assert wrong == []
    assert found[0].object["y"] == [{"a": 1}, {"a": 1}]


def test_ten_thousand_documents_are_cut_off_with_a_word() -> None:
    found, wrong = split(f"{POD}\n---\n" * 10_000)
    assert len(found) == MAX_DOCUMENTS
    (told,) = wrong
    assert f"more than {MAX_DOCUMENTS} documents" in told


def test_a_giant_file_is_refused() -> None:
    assert split("#" * (MAX_BYTES + 1)) == ([], [f"f.yaml: has more than {MAX_BYTES // 1024 // 1024} MiB"])


def test_items_of_lists_are_objects() -> None:
    found, wrong = split(
        "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Pod}, 7, {apiVersion: v1, kind: PodList, items:"
        " [{metadata: {name: b}}]}]}"
    )
    assert [item.object["kind"] for item in found] == ["Pod", "Pod"]
    assert found[1].object["apiVersion"] == "v1"
    assert wrong == ["f.yaml:1: holds int, not a Kubernetes object"]


def test_json_is_read() -> None:
    found, wrong = split('{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}')
    assert (len(found), wrong) == (1, [])
