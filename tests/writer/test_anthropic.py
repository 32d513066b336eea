"""The writer of Anthropic's Messages API: its own library over our client, with our guards."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from kdcli.api import Answer, Request
from kdcli.errors import ConfigError
from kdcli.writer.anthropic import AnthropicWriter
from tests.servers.chat import ChatServer, serving

SECRET = "correct-horse-battery"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say something."},
    {"role": "assistant", "content": "Something."},
    {"role": "user", "content": "More."},
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving(key=SECRET) as server:
        yield server


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.store.http._random", lambda state: 0.01)
    monkeypatch.setenv("MY_LLM_LOGIN", SECRET)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "another-vendors-key")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")


def writer(server: ChatServer, **settings: Any) -> AnthropicWriter:
    given: dict[str, Any] = {"url": server.root, "model": "m", "api_key_env": "MY_LLM_LOGIN", "retries": 1}
    return AnthropicWriter(**(given | {"timeout": 30.0} | settings))


def one(writer: AnthropicWriter, **settings: Any) -> Answer:
    (answer,) = writer.write([Request(**({"messages": MESSAGES} | settings))])
    return answer


def test_it_sends_what_was_asked_and_takes_what_was_written(server: ChatServer) -> None:
    answer = one(writer(server, top_p=0.9), n=2, temperature=0.5, max_tokens=9, stop=["\n"])
    expected = {
        "model": "m",
        "system": "Be brief.",
        "messages": MESSAGES[1:],
        "max_tokens": 9,
        "stop_sequences": ["\n"],
    }
    assert server.requests == [expected | {"temperature": 0.5, "top_p": 0.9}] * 2
    assert len(answer.texts) == 2 and list(answer.finished) == ["stop"] * 2
    assert (answer.prompt_tokens, answer.completion_tokens, answer.model) == (2 * 4, 2 * 2, "m")


def test_only_the_servers_own_key_is_sent_and_it_stands_nowhere_else(
    server: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    asking = writer(server)
    server.fail("status:500", "status:400")
    failed = one(asking)
    assert failed.failed == "HTTP 400" and not one(asking).failed
    assert {headers["x-api-key"] for headers in server.headers} == {SECRET}
    assert not any("authorization" in headers for headers in server.headers)
    assert all(headers["anthropic-version"] for headers in server.headers)
    seen = f"{caplog.text} {failed} {asking.identity()} {vars(asking)} {vars(asking._library)}"
    assert SECRET not in seen and "another-vendors-key" not in seen
    assert "Say something" not in caplog.text


def test_a_vendors_key_goes_to_the_vendor_alone(server: ChatServer) -> None:
    with pytest.raises(ConfigError, match=r"ANTHROPIC_API_KEY is a key for api\.anthropic\.com"):
        one(writer(server, api_key_env="ANTHROPIC_API_KEY"))
    assert server.asked == 0


@pytest.mark.parametrize(
    ("reason", "finished"),
    [
        *(("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"), ("refusal", "refusal")),
        ("model_context_window_exceeded", "length"),
    ],
)
def test_why_a_text_ended_is_told_in_three_words(reason: str, finished: str, server: ChatServer) -> None:
    server.fail(f"finish:{reason}")
    assert list(one(writer(server)).finished) == [finished]


PASSING = {
    "status:529": "HTTP 529",
    "status:429:0.01": "HTTP 429",
    "status:500": "HTTP 500",
    "json": "no JSON",
    "html": "no JSON",
    "cut": "connection cut",
    "reset": "no connection",
    "choices": "empty answer",
    "empty": "empty answer",
    "unfinished": "incomplete answer",
    "finish:pause_turn": "no text",
    "slow:3": "timeout",
    "huge": "answer too long",
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_asked_again_and_then_a_failure(fault: str, server: ChatServer) -> None:
    asking = writer(server, **({"timeout": 1.5} if PASSING[fault] == "timeout" else {}))
    server.fail(fault)
    assert not one(asking).failed
    assert server.asked == 2, "each try is ours: the library tries nothing again"
    server.fail_when("Say", fault)
    failed = one(asking)
    assert (failed.failed, list(failed.texts)) == (PASSING[fault], [])
    assert "Say something" not in failed.detail


@pytest.mark.parametrize(("fault", "failed"), [("context", "context too long"), ("status:400", "HTTP 400")])
def test_a_refusal_of_one_request_is_not_asked_again(fault: str, failed: str, server: ChatServer) -> None:
    server.fail(fault)
    assert one(writer(server)).failed == failed
    assert server.asked == 1


@pytest.mark.parametrize(("fault", "told"), [("status:401", "api_key_env"), ("redirect", "redirects")])
def test_what_holds_for_all_requests_ends_the_asking(fault: str, told: str, server: ChatServer) -> None:
    asking = writer(server)
    server.fail(fault)
    for _ in range(2):
        with pytest.raises(ConfigError, match=told):
            one(asking)
    assert server.asked == 1


def test_closed_schemas_are_sent_until_the_server_says_that_it_knows_none(server: ChatServer) -> None:
    asking = writer(server)
    one(asking, form={"json": SCHEMA})
    assert server.requests[-1]["output_config"] == {"format": {"type": "json_schema", "schema": SCHEMA}}
    for form in ({"regex": "a|b"}, {"json": SCHEMA | {"required": []}}):
        one(asking, form=form)
        assert "output_config" not in server.requests[-1]
    server.forget()
    server.fail("form")
    assert not one(asking, form={"json": SCHEMA}).failed and not one(asking, form={"json": SCHEMA}).failed
    assert ["output_config" in body for body in server.requests] == [True, False, False]
