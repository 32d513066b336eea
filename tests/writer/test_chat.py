"""The writer of OpenAI-compatible servers: what it sends, what it takes, and every stated failure injected."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kdcli.api import Answer, Request
from kdcli.errors import ConfigError
from kdcli.writer._served import closed
from kdcli.writer.chat import ChatWriter
from tests.servers.chat import TINY, Asked, ChatServer, serving

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
SECRET = "correct-horse-battery"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.store.http._random", lambda state: 0.01)


def writer(server: ChatServer, **settings: Any) -> ChatWriter:
    return ChatWriter(**({"url": server.url, "model": "any", "retries": 2, "timeout": 30.0} | settings))


def one(writer: ChatWriter, **settings: Any) -> Answer:
    (answer,) = writer.write([Request(**({"messages": MESSAGES, "seed": 7} | settings))])
    return answer


def test_it_sends_what_was_asked_and_takes_what_was_written(server: ChatServer) -> None:
    answer = one(writer(server, top_p=0.9, extra_body={"top_k": 5}), n=3, temperature=0.5, max_tokens=9, stop=["\n"])
    sent = {"model": "any", "messages": MESSAGES, "n": 3, "seed": 7, "temperature": 0.5, "top_p": 0.9, "max_tokens": 9}
    assert server.requests == [sent | {"stop": ["\n"], "top_k": 5}]
    assert len(set(answer.texts)) == 3 and list(answer.finished) == ["stop"] * 3
    assert (answer.prompt_tokens, answer.completion_tokens, answer.model) == (4, 6, "any")
    assert len(answer.date) == 10 and not answer.failed


def test_what_is_not_set_is_not_sent(server: ChatServer) -> None:
    one(writer(server, temperature=None, top_p=None, send_seed=False, max_tokens_name="max_completion_tokens"))
    assert server.requests == [{"model": "any", "messages": MESSAGES, "max_completion_tokens": 512}]


def test_a_server_that_ignores_n_is_asked_for_the_rest_with_other_seeds(server: ChatServer) -> None:
    server.fail("fewer", "fewer", "fewer")
    answer = one(writer(server), n=3)
    assert [body.get("n", 1) for body in server.requests] == [3, 2, 1]
    assert [body["seed"] for body in server.requests] == [7, 8, 9]
    assert len(set(answer.texts)) == 3
    assert answer.prompt_tokens == 3 * 4 and answer.completion_tokens == 3 * 2


def test_tokens_are_estimated_where_the_server_counts_none(server: ChatServer) -> None:
    server.fail("usage")
    answer = one(writer(server))
    assert answer.prompt_tokens == (9 + 3) // 4 + 4 + (14 + 3) // 4 + 4
    assert answer.completion_tokens == -(-len(answer.texts[0]) // 4)


@pytest.mark.parametrize(
    ("reason", "finished"),
    [("stop", "stop"), ("length", "length"), ("max_tokens", "length"), ("content_filter", "refusal"), ("eos", "stop")],
)
def test_why_a_text_ended_is_told_in_three_words(reason: str, finished: str, server: ChatServer) -> None:
    server.fail(f"finish:{reason}")
    assert list(one(writer(server)).finished) == [finished]


def test_an_answer_without_text_may_still_be_a_refusal_or_cut_off() -> None:
    read = ChatWriter._text
    message: dict[str, Any] = {"content": None, "refusal": "I cannot help with that."}
    kept = ChatWriter(url="http://127.0.0.1:1", model="m")
    assert read(kept, {"message": message, "finish_reason": "stop"}) == ("I cannot help with that.", "refusal")
    assert read(kept, {"message": {"content": None}, "finish_reason": "content_filter"}) == ("", "refusal")
    assert read(kept, {"message": {"content": ""}, "finish_reason": "length"}) == ("", "length")


@pytest.mark.parametrize("keep", [False, True])
def test_what_a_model_thought_is_left_out_unless_it_is_kept(keep: bool) -> None:
    message = {"content": "4", "reasoning_content": "2 + 2"}
    text, _ = ChatWriter(url="http://127.0.0.1:1", model="m", keep_reasoning=keep)._text(
        {"message": message, "finish_reason": "stop"}
    )
    assert text == ("<think>\n2 + 2\n</think>\n\n4" if keep else "4")


# ------------------------------------------------------------------------------------------------------- failures

PASSING = {
    "status:429": "HTTP 429",
    "status:500": "HTTP 500",
    "status:503:0.01": "HTTP 503",
    "status:529": "HTTP 529",
    "json": "no JSON",
    "html": "no JSON",
    "notjson": "no JSON",
    "cut": "connection cut",
    "reset": "no connection",
    "close": "no connection",
    "choices": "no choices",
    "null": "empty answer",
    "empty": "empty answer",
    "unfinished": "incomplete answer",
    "finish:error": "no text",
    "slow:3": "timeout",
    "hang": "timeout",
    "drip:0.05": "timeout",
    "huge": "answer too long",
}


def patience(fault: str) -> dict[str, float]:
    """Little where it is to end."""
    return {"timeout": 1.5} if PASSING[fault] == "timeout" else {}


@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_asked_again(fault: str, server: ChatServer) -> None:
    expected = one(writer(server))
    server.forget()
    server.fail(fault)
    assert one(writer(server, **patience(fault))) == expected
    assert server.asked == 2


@pytest.mark.parametrize("fault", [fault for fault in PASSING if fault.partition(":")[0] not in ("hang", "drip")])
def test_what_does_not_pass_is_a_failure_and_never_data(fault: str, server: ChatServer) -> None:
    server.fail_when("Say", fault)
    answer = one(writer(server, retries=1, **patience(fault)))
    assert (answer.failed, list(answer.texts), server.asked) == (PASSING[fault], [], 2)
    assert answer.detail and "Say something" not in answer.detail
    server.mend()
    assert not one(writer(server)).failed, "one request's failure is that request's"


@pytest.mark.parametrize(
    ("fault", "failed"),
    [
        ("context", "context too long"),
        ("status:400", "HTTP 400"),
        ("status:422", "HTTP 422"),
        ("status:413", "HTTP 413"),
    ],
)
def test_a_refusal_of_one_request_is_not_asked_again(fault: str, failed: str, server: ChatServer) -> None:
    asking = writer(server)
    server.fail(fault)
    assert one(asking).failed == failed
    assert server.asked == 1
    assert not one(asking).failed


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("status:401", "api_key_env"),
        ("status:402", "no credit"),
        ("status:403", "api_key_env"),
        ("status:404", "writer.url.*writer.model"),
        ("quota", "exceeded your current quota.*no credit"),
        ("redirect", "redirects"),
    ],
)
def test_what_holds_for_all_requests_ends_the_asking(fault: str, told: str, server: ChatServer) -> None:
    asking = writer(server)
    server.fail(fault)
    for _ in range(3):
        with pytest.raises(ConfigError, match=told) as caught:
            one(asking)
        assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) == 1
    assert server.asked == 1, "nothing is asked after it"


def test_no_key_and_no_server_and_a_refused_address_are_told(
    monkeypatch: pytest.MonkeyPatch, server: ChatServer
) -> None:
    monkeypatch.delenv("MY_LLM_LOGIN", raising=False)
    with pytest.raises(ConfigError, match="variable MY_LLM_LOGIN is not set"):
        one(writer(server, api_key_env="MY_LLM_LOGIN"))
    assert server.asked == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = one(ChatWriter(url=f"http://127.0.0.1:{free.getsockname()[1]}/v1", model="m", retries=1))
    assert down.failed == "no connection" and "is the server running" in down.detail
    with pytest.raises(ConfigError, match=r"writer\.url.*https"):
        ChatWriter(url="http://example.org/v1", model="m")


def test_retry_after_is_waited_for(server: ChatServer) -> None:
    server.fail("status:429:0.4")
    begun = time.monotonic()
    assert not one(writer(server)).failed
    assert time.monotonic() - begun >= 0.4


def test_a_wait_for_another_try_ends_when_the_key_is_wrong(server: ChatServer) -> None:
    """Sixteen threads wait a minute each; the seventeenth learns that the key is wrong."""
    asking = writer(server)
    server.fail_when("wait", "status:429:60")
    server.fail_when("wrong", "status:401")
    begun = time.monotonic()

    def ask(words: str) -> str:
        try:
            return asking.write([Request(messages=[{"role": "user", "content": words}])])[0].failed
        except ConfigError:
            return "config"

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, "wait") for _ in range(4)]
        while server.asked < 4:
            time.sleep(0.01)
        assert ask("wrong") == "config"
        assert {one.result() for one in waiting} <= {"HTTP 429", "config"}
    assert time.monotonic() - begun < 30


# ------------------------------------------------------------------------------------------------------ connections


def test_connections_are_kept_and_one_that_the_server_closed_is_opened_again(server: ChatServer) -> None:
    asking = writer(server, retries=0)
    for _ in range(5):
        assert not one(asking).failed
    assert server.connections == 1
    server.fail("close")  # the server hangs up on a kept connection instead of answering
    assert not one(asking).failed
    assert server.connections == 2


def test_many_threads_ask_at_once_and_get_their_own_answers() -> None:
    many = threading.Event()

    def say(asked: Asked) -> str:
        if server.most >= 8:
            many.set()
        assert many.wait(20), "no more than a few at once"
        return f"to {asked.prompt}"

    with serving(say, latency=0.01) as server:
        asking = writer(server, concurrency=16)

        def ask(i: int) -> bool:
            (answer,) = asking.write([Request(messages=[{"role": "user", "content": f"question {i}"}])])
            return list(answer.texts) == [f"to question {i}"]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(ask, range(64)))
        assert 8 <= server.most <= 16 and server.connections <= 16


# ------------------------------------------------------------------------------------------------- structured output


@pytest.mark.parametrize(
    ("structured", "form", "field"),
    [
        ("auto", {"json": SCHEMA}, "response_format"),
        ("auto", {"regex": "a|b"}, "structured_outputs"),
        ("response_format", {"json": SCHEMA}, "response_format"),
        ("response_format", {"regex": "a|b"}, None),
        ("guided", {"json": SCHEMA}, "structured_outputs"),
        ("guided", {"regex": "a|b"}, "structured_outputs"),
        ("none", {"json": SCHEMA}, None),
    ],
)
def test_forms_are_sent_as_the_server_takes_them(
    structured: Any, form: Any, field: str | None, server: ChatServer
) -> None:
    one(writer(server, structured=structured), form=form)
    assert {"response_format", "structured_outputs"} & set(server.requests[0]) == ({field} if field else set())
    if field == "response_format":
        told = server.requests[0][field]["json_schema"]
        assert told["schema"] == SCHEMA and told["strict"] is True
    if field == "structured_outputs":
        assert server.requests[0][field] == form


def test_a_server_that_knows_no_forms_is_asked_without_and_that_is_told_once(
    server: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    asking = writer(server)
    server.fail_when("Say", "form")
    with caplog.at_level(logging.WARNING):
        assert [one(asking, form={"json": SCHEMA}).failed for _ in range(3)] == [""] * 3
    assert ["response_format" in body for body in server.requests] == [True, False, False, False]
    assert sum("does not take response_format" in line for line in caplog.messages) == 1


def test_what_was_chosen_expressly_is_not_given_up(server: ChatServer) -> None:
    server.fail_when("Say", "form")
    assert one(writer(server, structured="response_format"), form={"json": SCHEMA}).failed == "HTTP 400"


def test_strict_schemas_are_told_from_others() -> None:
    loose = SCHEMA | {"required": []}
    assert closed(SCHEMA) and closed({"type": "array", "items": SCHEMA})
    assert not closed(loose) and not closed({"anyOf": [SCHEMA, loose]})
    assert not closed({"type": "object", "properties": {}})


def test_a_real_model_behind_the_server_keeps_to_seeds_and_forms() -> None:
    with serving(model=TINY) as server:
        asking = writer(server, timeout=60.0, max_tokens=24)
        first, again, other = (one(asking, n=2, seed=seed, form={"json": SCHEMA}) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first.texts)) == 2 and all(text.startswith('{"a":"') for text in first.texts)


# ------------------------------------------------------------------------------------------------------------- keys


def test_keys_are_sent_to_the_server_and_stand_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_LLM_LOGIN", SECRET)
    caplog.set_level(logging.DEBUG)
    with serving(key=SECRET) as server:
        asking = writer(server, api_key_env="MY_LLM_LOGIN")
        assert not one(asking).failed
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
        server.fail("status:500", "status:400")
        failed = one(asking)
        monkeypatch.setenv("MY_LLM_LOGIN", "wrong-horse-battery")
        with pytest.raises(ConfigError) as caught:
            one(writer(server, api_key_env="MY_LLM_LOGIN"))
        seen = f"{caplog.text} {failed} {caught.value} {asking.identity()} {vars(asking)} {vars(asking.client)}"
    assert "horse-battery" not in seen
    assert "Say something" not in caplog.text


def test_the_identity_is_what_answers_depend_on(server: ChatServer) -> None:
    same = writer(server).identity()
    assert same == writer(server, concurrency=2, timeout=9.0, retries=9, price_prompt=1.0).identity()
    changes: list[dict[str, Any]] = [{"model": "b"}, {"temperature": 0.0}, {"top_p": 0.5}, {"max_tokens": 3}]
    changes += [{"extra_body": {"a": 1}}, {"keep_reasoning": True}, {"structured": "none"}]
    assert all(writer(server, **change).identity() != same for change in changes)
    assert writer(server).endpoint == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    "settings",
    [{"max_tokens": 0}, {"concurrency": 0}, {"price_prompt": -1.0}, {"api_key_env": "sk-abc"}, {"url": "ftp://h"}],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    given: dict[str, Any] = {"url": "http://127.0.0.1:1", "model": "m"} | settings
    with pytest.raises(ConfigError, match=f"writer.{next(iter(settings))}"):
        ChatWriter(**given)


def test_closing_ends_waits(server: ChatServer) -> None:
    asking = writer(server)
    server.fail("status:429:60")
    timer = threading.Timer(0.2, asking.close)
    timer.start()
    begun = time.monotonic()
    assert one(asking).failed == "HTTP 429"
    assert time.monotonic() - begun < 30
