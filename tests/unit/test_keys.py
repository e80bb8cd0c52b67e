"""Client keys from Secrets: what is usable, and what is told without ever showing a key."""

from __future__ import annotations

import pytest

from securevllm.render.envoy import ClientKey, api_keys_file
from securevllm.render.keys import judge

GOOD = b"a-key-of-twenty-characters"


def test_good_keys_are_sorted_by_client() -> None:
    found = judge({"b": {"zoe": GOOD, "adam": b"another-key-of-that-length"}, "a": {"max": b"Zz09._~+/=-aaaaaaaa"}})
    assert [key.client for key in found.keys] == ["adam", "max", "zoe"]
    assert found.problems == ()
    assert api_keys_file(found.keys)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_a_line_end_is_no_part_of_a_key(ending: bytes) -> None:
    assert judge({"a": {"max": GOOD + ending}}).keys == (ClientKey("max", GOOD.decode()),)


@pytest.mark.parametrize(
    "value",
    [b"", b"short", b"x" * 15, b"x" * 513, GOOD + b" ", b" " + GOOD, GOOD + b"\n\n", GOOD + b",b", b"\xff" * 20,
     b"\xc3\xa9" * 20, GOOD + b"\x00", b"'" + GOOD, b'"' + GOOD],
)  # fmt: skip
def test_what_a_header_cannot_carry_is_no_key(value: bytes) -> None:
    found = judge({"team": {"max": value}})
    assert found.keys == ()
    assert found.problems == ("Secret team, client max: a key is 16 to 512 characters of A-Z a-z 0-9 . _ ~ + / = -",)


@pytest.mark.parametrize("client", ["", ".a", "-a", "_a", "a" * 64, "a b", "a\nb", "\u00e9"])
def test_what_is_no_client_id(client: str) -> None:
    found = judge({"team": {client: GOOD}})
    assert found.keys == ()
    assert found.problems == (f"Secret team, data key {client!r}: not a client id of at most 63 characters",)


def test_a_key_of_two_clients_counts_for_the_first() -> None:
    found = judge({"a": {"one": GOOD}, "b": {"two": GOOD}})
    assert [key.client for key in found.keys] == ["one"]
    assert found.problems == ("Secret b, client two: the same key as client one",)


def test_a_client_of_two_secrets_counts_for_the_first() -> None:
    found = judge({"a": {"one": GOOD}, "b": {"one": b"another-key-of-that-length"}})
    assert found.keys == (ClientKey("one", GOOD.decode()),)
    assert found.problems == ("Secret b, client one: another Secret has a client of this id",)


def test_no_key_is_ever_shown() -> None:
    secrets = {"a": {"one": GOOD, "two": GOOD, "three": GOOD + b" ", "!": GOOD}, "b": {"one": GOOD}}
    found = judge(secrets)
    assert GOOD.decode() not in repr(found)
    assert len(found.problems) == 4
