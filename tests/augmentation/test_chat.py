"""Conversations: who speaks when, what each sees, and how they end."""

from __future__ import annotations

import pytest

from kdcli.api import Answer, Example, Request
from kdcli.augmentation.chat import Chat
from kdcli.augmentation.chat_debate import ChatDebate
from kdcli.errors import ConfigError
from tests.desks import FakeDesk, run

ROW = Example(prompt="Hello 0", domain="d", meta={"license": "MIT"})


def counted(request: Request) -> str:
    """Each speaker says how many messages the conversation had."""
    text = request.messages[-1]["content"]
    if text.startswith("The conversation so far"):
        return f"user after {text.count('User: ') + text.count('Assistant: ')}"
    return f"assistant after {sum(m['role'] != 'system' for m in request.messages)}"


def test_roles_take_turns_from_the_rows_prompt_on() -> None:
    step = Chat(turns=3)
    row = run(step, [ROW], counted)[0]
    assert row.messages == [
        {"role": "user", "content": "Hello 0"},
        {"role": "assistant", "content": "assistant after 1"},
        {"role": "user", "content": "user after 2"},
        {"role": "assistant", "content": "assistant after 3"},
        {"role": "user", "content": "user after 4"},
        {"role": "assistant", "content": "assistant after 5"},
    ]
    assert (row.kind, row.prompt, row.domain, row.meta["license"]) == ("messages", None, "d", "MIT")
    assert len(row.meta["parents"]) == 1
    assert len(step.desk.asked) == 5


def test_the_assistant_sees_earlier_turns_as_turns() -> None:
    step = Chat(turns=2)
    run(step, [ROW], counted)
    assert [m["role"] for m in step.desk.asked[2][1].messages] == ["system", "user", "assistant", "user"]


def test_all_conversations_are_asked_for_one_turn_at_once() -> None:
    step = Chat(turns=2)
    run(step, [Example(prompt=f"Hello {i}") for i in range(5)], counted)
    shown = [sum(m["role"] != "system" for m in request.messages) for _, request in step.desk.asked]
    assert shown == [1] * 5 + [1] * 5 + [3] * 5


def test_the_user_may_be_another_writer() -> None:
    step = Chat(turns=2, writer="a", writer_user="b")
    run(step, [ROW], counted)
    assert [writer for writer, _ in step.desk.asked] == ["a", "b", "a"]
    assert set(step.writers()) == {"a", "b"}


def test_a_topic_without_a_prompt_is_opened_by_the_user() -> None:
    step = Chat(user="chat/user_topic", turns=1)
    row = run(step, [Example(meta={"topic": "glaciers"})], lambda request: "said")[0]
    assert [m["role"] for m in row.messages or ()] == ["user", "assistant"]
    assert "glaciers" in step.desk.asked[0][1].messages[-1]["content"]


def test_a_chat_that_ends_with_the_user_goes_on() -> None:
    begun = Example(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    open_ = Example(messages=[*(begun.messages or ()), {"role": "user", "content": "c"}])
    rows = run(Chat(turns=1), [begun, open_], counted)
    assert [len(row.messages or ()) for row in rows] == [4, 4]
    assert [m["content"] for m in (rows[1].messages or ())][:3] == ["a", "b", "c"]


def test_a_conversation_ends_before_the_word_that_stops_it() -> None:
    meta = {"user_role": "a baker", "assistant_role": "an engineer", "task": "build an oven"}
    said = iter(["instruction 1", "solution 1", "TASK_DONE"])
    step = Chat(assistant="chat/role_assistant", user="chat/role_user", turns=9, stop="'TASK_DONE' in message")
    row = run(step, [Example(meta=meta)], lambda request: next(said))[0]
    assert [m["content"] for m in (row.messages or ())[1:]] == ["instruction 1", "solution 1"]
    system = (row.messages or ())[0]
    assert system["role"] == "system"
    assert "You are an engineer, and you help a baker" in system["content"]
    silent = Chat(turns=2, stop="true")
    assert run(silent, [ROW], counted) == []
    assert silent.desk.reasons == ["no conversation"]


def test_one_call_may_write_the_whole_conversation() -> None:
    said = "[|Human|] Hi\n[|AI|] Hello\nthere\n[|Human|] Why?\n[|AI|] Because.\n[|Human|]"
    step = Chat(assistant="chat/self_chat", user=None)
    row = run(step, [ROW], lambda request: said)[0]
    assert row.messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello\nthere"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    ]
    assert len(step.desk.asked) == 1


def test_a_conversation_whose_call_fails_is_set_aside_and_no_other() -> None:
    def say(request: Request) -> str | Answer:
        late = "Hello 1" in str(request.messages) and len(request.messages) > 2
        return Answer(failed="HTTP 500") if late else counted(request)

    step = Chat(turns=2)
    rows = run(step, [Example(prompt=f"Hello {i}") for i in range(3)], say)
    assert [(row.messages or ({},))[0]["content"] for row in rows] == ["Hello 0", "Hello 2"]
    assert step.desk.reasons == ["HTTP 500"]


def test_rows_that_the_step_is_not_for_pass_in_place() -> None:
    done = Example(prompt="P", response="R")
    rows = run(Chat(turns=1, only="response is not defined"), [done, ROW], counted)
    assert rows[0] == done
    assert rows[1].kind == "messages"


def test_equal_input_gives_equal_requests() -> None:
    rows = [Example(prompt=f"Hello {i}") for i in range(3)]

    def seeds(some: list[Example]) -> dict[str, list[int]]:
        step = Chat(turns=2)
        run(step, some, counted)
        found: dict[str, list[int]] = {}
        for _, request in step.desk.asked:
            found.setdefault(str(request.messages), []).append(request.seed)
        return found

    assert seeds(rows) == seeds(rows[::-1])
    assert len({seed for many in seeds(rows).values() for seed in many}) == 9


def test_a_debate_gives_a_statement_of_each_side() -> None:
    step = ChatDebate(rounds=2, writer="p", writer_con="c")
    desk = FakeDesk()
    spoken = iter(range(99))
    desk.say = lambda request: f"speech {next(spoken)}"
    step.open(desk)
    rows = list(step([Example(meta={"topic": "school at nine"})]))
    assert [(row.prompt, row.response, row.meta["side"]) for row in rows] == [
        ("Argue in favour of this: school at nine", "speech 4", "pro"),
        ("Argue against this: school at nine", "speech 5", "con"),
    ]
    assert rows[0].meta["debate"] == [
        {"role": role, "content": f"speech {i}"} for i, role in enumerate(("pro", "con", "pro", "con"))
    ]
    assert [writer for writer, _ in desk.asked] == ["p", "c", "p", "c", "p", "c"]
    assert "speech 3" in desk.asked[4][1].messages[-1]["content"], "a statement sees the whole debate"
    assert rows[0].group is None, "two prompts are no group"


def test_no_turns_are_refused() -> None:
    with pytest.raises(ConfigError, match="turns is 0"):
        Chat(turns=0)
    with pytest.raises(ConfigError, match="names meta_topic"):
        Chat(stop="meta_topic")
