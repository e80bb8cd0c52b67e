from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest
import structlog
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from securevllm import log


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(log_format: log.LogFormat = "json", level: str = "INFO") -> io.StringIO:
    stream = io.StringIO()
    log.configure(log_format, level, stream)
    return stream


def last(stream: io.StringIO) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(stream.getvalue().splitlines()[-1])
    return record


def test_a_record_has_time_level_logger_context_and_fields() -> None:
    stream = lines()
    with structlog.contextvars.bound_contextvars(key="default/llama", reconcile=7):
        structlog.stdlib.get_logger("securevllm.x").info("applied", objects=3)

    record = last(stream)
    assert datetime.fromisoformat(record.pop("timestamp")).utcoffset() is not None
    assert record == {
        "event": "applied",
        "level": "info",
        "logger": "securevllm.x",
        "key": "default/llama",
        "reconcile": 7,
        "objects": 3,
    }


def test_the_standard_library_takes_the_same_way() -> None:
    stream = lines()
    with structlog.contextvars.bound_contextvars(key="default/llama"):
        logging.getLogger("kopf.objects").warning("watch of %s ended", "pods")

    record = last(stream)
    assert (record["event"], record["logger"], record["key"]) == (
        "watch of pods ended",
        "kopf.objects",
        "default/llama",
    )


def test_libraries_stay_above_info_and_debug_is_off_by_default() -> None:
    stream = lines()
    logging.getLogger("kopf.objects").info("handler succeeded")
    structlog.stdlib.get_logger("securevllm.x").debug("detail")

    assert stream.getvalue() == ""


def test_console_lines_are_for_people() -> None:
    stream = lines("console")
    structlog.stdlib.get_logger("securevllm.x").info("applied", objects=3)

    assert "applied" in stream.getvalue()
    assert "objects=3" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "tokens",
        "hf_token",
        "Authorization",
        "password",
        "api_key",
        "api-key",
        "apiKey",
        "engine_key",
        "privateKey",
    ],
)
def test_values_under_a_telling_name_are_replaced(name: str) -> None:
    stream = lines()
    structlog.stdlib.get_logger("x").info("e", nested=[{name: {"deep": "hunter2"}}], **{name: "hunter2"})

    assert "hunter2" not in stream.getvalue()
    assert last(stream)[name] == log.REDACTED


def test_names_of_secrets_counts_and_the_queue_key_stay_readable() -> None:
    stream = lines()
    structlog.stdlib.get_logger("x").info("e", key="a/b", secretName="llama-keys", max_tokens=5, keys=["a"])

    record = last(stream)
    assert (record["key"], record["secretName"], record["max_tokens"], record["keys"]) == (
        "a/b",
        "llama-keys",
        5,
        ["a"],
    )


def test_a_secret_object_shows_its_name_but_not_its_data() -> None:
    stream = lines()
    secret = {"kind": "Secret", "metadata": {"name": "llama"}, "data": {"a": "aGVsbG8="}, "stringData": {"b": "plain"}}
    structlog.stdlib.get_logger("x").info("e", items=[secret], config={"kind": "ConfigMap", "data": {"a": "shown"}})

    record = last(stream)
    assert record["items"][0] == secret | {"data": log.REDACTED, "stringData": log.REDACTED}
    assert record["config"]["data"] == {"a": "shown"}


@dataclass
class Holder:
    inside: str


@given(
    secret=st.text(min_size=log.SHORTEST_SECRET, max_size=40),
    around=st.text(max_size=10),
    log_format=st.sampled_from(["json", "console"]),
)
@settings(max_examples=200, deadline=None)
def test_a_registered_secret_is_never_in_the_output(secret: str, around: str, log_format: log.LogFormat) -> None:
    # Texts that every line contains, or that the marker makes, are no secrets.
    fixed = f"e {log.REDACTED} timestamp event level logger info error exception name items Holder inside ValueError"
    assume(secret not in fixed and not secret.isspace() and "redacted" not in secret)
    assume(not any(char in secret for char in "[]"))
    log.register_secret(secret)
    stream = lines(log_format)
    logger = structlog.stdlib.get_logger("x")
    text = f"{around}{secret}{around}"
    logger.info("e", name=text, items=[text, {text: text}], holder=Holder(text), raw=text.encode("utf-8", "replace"))
    logger.info(text)
    # A body that somebody put into a text: the secret in it is escaped.
    logger.info("e", ascii=json.dumps({"k": text}), unicode=json.dumps({"k": text}, ensure_ascii=False))
    error = ValueError(text)
    error.__cause__ = KeyError(text)
    logger.error("e", exc_info=error)
    logging.getLogger("foreign").error("e %s", text, exc_info=error)

    output = stream.getvalue()
    assert output.count("\n") >= 4
    forms = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]}
    if secret.isascii():
        forms.add(base64.b64encode(secret.encode()).decode())
    assert not [form for form in forms if form in output]


def test_base64_of_a_registered_secret_is_taken_out() -> None:
    log.register_secret("correct horse battery")
    stream = lines()
    structlog.stdlib.get_logger("x").info("e", body=base64.b64encode(b"correct horse battery").decode())

    assert last(stream)["body"] == log.REDACTED


def test_short_values_are_not_registered() -> None:
    redactor = log.Redactor()
    redactor.register("abc")

    assert redactor.text("abc YWJj") == "abc YWJj"


def test_the_longest_of_overlapping_secrets_wins() -> None:
    redactor = log.Redactor()
    redactor.register("secret-value")
    redactor.register("secret-value-long")

    assert redactor.text("a secret-value-long b secret-value c") == "a [redacted] b [redacted] c"
