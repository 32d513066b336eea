"""An agent's trajectories: what it may do wrong without harm, when they end, and what becomes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kdcli.api import Answer, Example, Request
from kdcli.augmentation._environments import Bandit, same_text
from kdcli.augmentation._react import form, read
from kdcli.augmentation.trajectory import Trajectory
from kdcli.errors import ConfigError
from kdcli.store.examples import parse_example
from tests.desks import Say, run

TASK = Example(prompt="What is 6 * 7?", meta={"answer": "42"})
CALCULATE = "Thought: multiply\nAction: calculator\nAction Input: 6 * 7"
ANSWER = "Thought: done\nFinal Answer: 42"


def script(*texts: str) -> Say:
    """One text after the other, by how many steps the trajectory has."""
    return lambda request: texts[min(sum(m["role"] == "assistant" for m in request.messages), len(texts) - 1)]


def observed(row: Example) -> list[str]:
    return [m["content"] for m in row.messages or () if m["content"].startswith("Observation: ")]


def agent(**settings: Any) -> Trajectory:
    return Trajectory(**{"tools": ["calculator"], "keep": "all", **settings})


def test_thoughts_actions_and_observations_end_in_an_answer() -> None:
    step = agent()
    row = run(step, [TASK], script(CALCULATE, ANSWER))[0]
    assert [m["role"] for m in row.messages or ()] == ["system", "user", "assistant", "user", "assistant"]
    assert observed(row) == ["Observation: 42"]
    assert (row.meta["success"], row.meta["finished"], row.meta["steps"], row.score) == (True, True, 2, 1.0)
    assert row.meta["predicted"] == "42"
    parse_example({"messages": row.messages, "meta": dict(row.meta)})
    assert all(request.stop == ("\nObservation",) for _, request in step.desk.asked)


@pytest.mark.parametrize(
    ("action", "told"),
    [
        ("Action: telescope\nAction Input: moon", "there is no tool 'telescope'; the tools are calculator"),
        ("Action: calculator\nAction Input: 1/0", "division by zero"),
        ("Action: calculator\nAction Input: __import__('os').getcwd()", "only numbers"),
        ("Action: calculator", "no arithmetic expression"),
        ("I think it is forty-two", "neither an action nor an answer"),
        ("Action:\nAction Input: 3", "neither an action nor an answer"),
        ("Final Answer:", "neither an action nor an answer"),
    ],
)
def test_what_goes_wrong_is_an_observation(action: str, told: str) -> None:
    step = agent()
    row = run(step, [TASK], script(action, ANSWER))[0]
    assert told in observed(row)[0]
    assert (row.meta["success"], step.desk.reasons) == (True, [])


def test_observations_that_the_writer_makes_up_are_cut_off() -> None:
    row = run(agent(), [TASK], script(f"{CALCULATE}\nObservation: 43\nThought: so\nFinal Answer: 43", ANSWER))[0]
    assert (row.messages or ())[2]["content"] == CALCULATE
    assert row.meta["predicted"] == "42"


def test_an_unfinished_trajectory_is_set_aside_unless_kept() -> None:
    step = agent(keep="finished", max_steps=3)
    assert run(step, [TASK], script(CALCULATE)) == []
    assert step.desk.reasons == ["unfinished"]
    assert len(step.desk.asked) == 3
    row = run(agent(max_steps=3), [TASK], script(CALCULATE))[0]
    assert (row.meta["finished"], row.meta["steps"], "success" in row.meta) == (False, 3, False)
    assert (row.messages or ())[-1]["role"] == "assistant"


def test_only_successes_may_be_kept_and_nobody_knows_without_gold() -> None:
    rows = [TASK, Example(prompt="other", meta={"answer": "41"}), Example(prompt="no gold")]
    step = agent(keep="successful")
    assert len(run(step, rows, script(ANSWER))) == 1
    assert step.desk.reasons == ["unsuccessful", "unsuccessful"]
    assert [row.meta.get("success") for row in run(agent(), rows, script(ANSWER))] == [True, False, None]
    assert [row.score for row in run(agent(), rows, script(ANSWER))] == [1.0, 0.0, None]


def test_trajectories_go_on_together_step_by_step() -> None:
    step = agent()
    run(step, [Example(prompt=f"task {i}") for i in range(4)], script(CALCULATE, CALCULATE, ANSWER))
    assert [len(request.messages) for _, request in step.desk.asked] == [2] * 4 + [4] * 4 + [6] * 4


def test_a_failed_attempt_teaches_the_next_and_the_student_never_sees_it() -> None:
    def say(request: Request) -> str:
        text = request.messages[-1]["content"]
        if "went wrong" in text:
            assert "Final Answer: 41" in text
            assert "The answer was wrong" in text
            return "I forgot to multiply."
        return ANSWER if "I forgot to multiply." in text else "Final Answer: 41"

    step = agent(attempts=3, reflect="trajectory/reflect", keep="successful")
    row = run(step, [TASK], say)[0]
    assert (row.meta["attempts"], row.meta["success"], len(step.desk.asked)) == (2, True, 3)
    assert "I forgot" not in str(row.messages)
    assert len({request.seed for _, request in step.desk.asked}) == 3


def test_without_gold_there_is_one_attempt() -> None:
    step = agent(attempts=3)
    run(step, [Example(prompt="no gold")], script(ANSWER))
    assert len(step.desk.asked) == 1


def test_several_trajectories_of_a_row_are_a_group() -> None:
    rows = run(agent(n=3), [TASK, TASK], script(ANSWER))
    assert len(rows) == 6
    assert len({row.group for row in rows}) == 1
    step = agent(n=3)
    run(step, [TASK], script(ANSWER))
    assert len({request.seed for _, request in step.desk.asked}) == 3


def test_each_step_may_be_a_row_of_its_own() -> None:
    rows = run(agent(output="steps"), [TASK], script(CALCULATE, ANSWER))
    assert [row.response for row in rows] == [CALCULATE, ANSWER]
    assert "What is 6 * 7?" in str(rows[0].prompt)
    assert str(rows[1].prompt).startswith(str(rows[0].prompt))
    assert str(rows[1].prompt).endswith("Observation: 42")
    assert [row.meta["step"] for row in rows] == [1, 2]
    assert all(row.kind == "response" for row in rows)


def test_a_writer_plays_the_tools_of_a_row() -> None:
    tools = [{"name": "weather", "description": "tells the weather", "arguments": "a town"}]
    row = Example(prompt="Rain in Oslo?", meta={"tools": tools})

    def say(request: Request) -> str:
        text = str(request.messages)
        if "You play a tool" in text:
            assert "Oslo today" in text
            return '{"rain": true}'
        return "Final Answer: yes" if '{"rain": true}' in text else "Action: weather\nAction Input: Oslo today"

    step = agent(simulator="trajectory/simulated_tool", writer="teacher", writer_tool="player")
    made = run(step, [row], say)[0]
    assert observed(made) == ['Observation: {"rain": true}']
    assert "weather: tells the weather (input: a town)" in (made.messages or ())[0]["content"]
    assert [writer for writer, _ in step.desk.asked] == ["teacher", "player", "teacher"]
    assert set(step.writers()) == {"teacher", "player"}


def test_programs_run_in_the_sandbox_and_once() -> None:
    program = "Action: python\nAction Input:\n```python\nprint(6 * 7)\nimport random; print(random.random())\n```"
    step = Trajectory(keep="all")
    rows = run(step, [TASK, TASK], script(program, "Action: python\nAction Input: 1/", ANSWER))
    assert observed(rows[0])[0].startswith("Observation: 42\n0.")
    assert observed(rows[0])[0] == observed(rows[1])[0], "a program that draws numbers has printed what it printed"
    assert "SyntaxError" in observed(rows[0])[1]


def test_search_and_lookup_read_a_file(tmp_path: Path) -> None:
    file = tmp_path / "docs.jsonl"
    rome = '{"title": "Rome", "text": "Rome is old. It lies on the Tiber. It is a capital."}'
    file.write_text(f'{rome}\n{{"text": "Cats purr."}}\n')
    actions = ("search\nAction Input: city on the Tiber", "lookup\nAction Input: tiber", "lookup[tiber]", "search[zzz]")
    step = agent(tools=["search", "lookup"], documents=str(file), max_steps=9)
    row = run(step, [TASK], script(*(f"Action: {action}" for action in actions), ANSWER))[0]
    assert observed(row) == [
        "Observation: [1] Rome: Rome is old. It lies on the Tiber. It is a capital.",
        "Observation: (1 of 1) It lies on the Tiber.",
        "Observation: Error: there is no more",
        "Observation: Error: nothing was found; use other words",
    ]
    before = step.fingerprint()
    file.write_text('{"text": "Other."}\n')
    assert agent(tools=["search"], documents=str(file)).fingerprint() != before


def test_a_failed_call_sets_one_trajectory_aside() -> None:
    def say(request: Request) -> str | Answer:
        return Answer(failed="HTTP 500") if "task 1" in str(request.messages) else ANSWER

    step = agent()
    rows = run(step, [Example(prompt=f"task {i}") for i in range(3)], say)
    assert len(rows) == 2
    assert step.desk.reasons == ["HTTP 500"]


def test_a_rehearsal_counts_the_most_that_can_be_asked_and_runs_no_tool() -> None:
    step = agent(max_steps=4, attempts=2, reflect="trajectory/reflect", n=3)
    assert len(run(step, [TASK], rehearsal=True)) == 3
    assert len(step.desk.asked) == 3 * (4 + 1 + 4)
    assert step.desk.memory == {}


def test_rows_that_the_step_is_not_for_pass_in_place() -> None:
    done = Example(prompt="P", response="R")
    rows = run(agent(only="response is not defined"), [done, TASK], script(ANSWER))
    assert rows[0] == done
    assert rows[1].kind == "messages"


# ---------------------------------------------------------------------------------------------- bandits


def bandit(**settings: Any) -> Trajectory:
    return Trajectory(**{"environment": "bandit", "prompt": "trajectory/bandit", "max_steps": 30, **settings})


def test_a_bandit_pays_what_its_facts_say() -> None:
    row = run(bandit(arms=3), [TASK], lambda request: "A")[0]
    pulled = [m["content"] for m in row.messages or () if m["role"] == "assistant"]
    assert pulled == ["A"] * 30 == row.meta["pulls"]
    paid = [float(m["content"].split()[-1].rstrip(".")) for m in (row.messages or ())[3:] if m["role"] == "user"]
    assert len(paid) == 29, "the last pull is not told"
    assert row.meta["reward"] - sum(paid) in (0.0, 1.0)
    assert row.score == pytest.approx(row.meta["reward"] / 30)
    regret = 0.0 if row.meta["best_arm"] == "A" else 30 * 0.2
    assert row.meta["regret"] == pytest.approx(regret)
    assert row.meta["success"] == (row.meta["best_arm"] == "A")


def test_the_oracle_asks_nobody_and_regrets_less_than_chance() -> None:
    tasks = [Example(prompt=f"shop {i}") for i in range(30)]
    step = bandit(oracle=True, gap=0.5, max_steps=150)
    rows = run(step, tasks)
    assert step.desk.asked == []
    assert step.writers() == ()
    by_chance = 150 * 0.5 * 4 / 5
    assert sum(row.meta["regret"] for row in rows) / 30 < 0.5 * by_chance
    assert sum(row.meta["success"] for row in rows) > 25
    assert rows == run(bandit(oracle=True, gap=0.5, max_steps=150), tasks), "equal seeds, equal worlds"
    assert len({row.meta["best_arm"] for row in rows}) == 5


def test_a_summary_stands_for_the_past() -> None:
    """Raw history grows by two messages a step; a summary is told anew in the one message that is seen."""
    raw, summary = bandit(max_steps=4), bandit(max_steps=4, history="summary")
    run(raw, [TASK], lambda request: "B")
    run(summary, [TASK], lambda request: "B")
    assert [len(request.messages) for _, request in raw.desk.asked] == [2, 4, 6, 8]
    assert [len(request.messages) for _, request in summary.desk.asked] == [2, 2, 2, 2]
    assert "Arm B: pulled 3 times" in summary.desk.asked[3][1].messages[-1]["content"]
    steps = run(bandit(max_steps=4, history="summary", oracle=True, output="steps"), [TASK])
    assert [row.response for row in steps] == ["A", "B", "C", "D"], "UCB tries each arm first"
    assert "Arm C: pulled 1 times" in str(steps[3].prompt)
    assert str(steps[3].prompt).count("pulled") == 5


def test_no_arm_costs_a_step() -> None:
    row = run(bandit(max_steps=3), [TASK], lambda request: "I would rather not")[0]
    assert (row.meta["pulls"], row.score, row.meta["regret"]) == ([], 0.0, 0.0)
    assert "names no arm" in str(row.messages)


def test_ucb_is_the_formula() -> None:
    """After A: 1, 0 and B: 1, A has 0.5 + sqrt(2 ln 3 / 2) = 1.548 and B 1 + sqrt(2 ln 3) = 2.482. A pull of B paying
    0 makes both 0.5 + sqrt(2 ln 4 / 2) = 1.677: the first is taken."""
    world = Bandit(arms=2, rewards="bernoulli", gap=0.2, horizon=9, history="raw", seed=0)
    assert world.ucb() == 0
    world.pulls = [(0, 1.0)]
    assert world.ucb() == 1
    world.pulls = [(0, 1.0), (0, 0.0), (1, 1.0)]
    assert world.ucb() == 1
    world.pulls.append((1, 0.0))
    assert world.ucb() == 0


def test_gaussian_rewards_have_the_means_and_deviation_that_are_said() -> None:
    world = Bandit(arms=2, rewards="gaussian", gap=0.4, horizon=4000, history="raw", seed=3)
    for _ in range(3999):
        world.take("A")
    paid = [reward for _, reward in world.pulls]
    mean = sum(paid) / len(paid)
    assert mean == pytest.approx(world.means[0], abs=0.06)
    assert sum((reward - mean) ** 2 for reward in paid) / len(paid) == pytest.approx(1.0, abs=0.1)


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "name", "given", "answer"),
    [
        ("Thought: t\nAction: search\nAction Input: a b\nc", "search", "a b\nc", None),
        ("Action: search[who is it]", "search", "who is it", None),
        ("Action 2: `Search`\nAction Input 2: x\nThought: next", "Search", "x", None),
        ("Final Answer: 42\nThought: hm", "", "", "42"),
        ("Action: finish[42]", "", "", "42"),
        ("Action: s\nAction Input: x\nFinal Answer: 3", "s", "x", None),
        ("Final Answer: 3\nAction: s\nAction Input: x", "", "", "3"),
        ("nothing", "", "", None),
    ],
)
def test_the_first_action_or_answer_of_a_step_counts(text: str, name: str, given: str, answer: str | None) -> None:
    act = read(text)
    assert (act.name, act.input, act.answer) == (name, given, answer)


@pytest.mark.parametrize("text", [CALCULATE, ANSWER, "Thought: x\nAction: python\nAction Input: a = 1\nprint(a)"])
def test_the_form_of_a_step_takes_what_the_protocol_takes(text: str) -> None:
    pattern = form(["calculator", "python"])["regex"]
    assert re.fullmatch(pattern, text)
    other = text.replace("calculator", "telescope").replace("python", "p").replace("Final", "f")
    assert not re.fullmatch(pattern, other)


@pytest.mark.parametrize(
    ("gold", "said", "same"),
    [
        ("The Beatles", "beatles.", True),
        ("1,000", "1000.0", True),
        ("$3.50", "3.5", True),
        ("3.5", "35", False),
        ("yes", "no", False),
        ("-4", "4", False),
        ("", "", False),
    ],
)
def test_answers_agree_by_words_or_by_value(gold: str, said: str, same: bool) -> None:
    assert same_text(gold, said) is same


def test_mathematics_may_be_compared_by_math_verify() -> None:
    task = Example(prompt="half?", meta={"answer": "1/2"})
    assert [
        run(agent(match=match), [task], script(r"Final Answer: $\frac{1}{2}$"))[0].meta["success"]
        for match in ("text", "math")
    ] == [False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tools": ["telescope"]}, "no tool telescope"),
        ({"tools": ["search"]}, "search needs trajectory.documents"),
        ({"tools": []}, "tools is empty"),
        ({"oracle": True}, "environment=bandit alone"),
        ({"environment": "bandit"}, "does not name `arms`"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"environment": "bandit", "prompt": "trajectory/bandit", "arms": 1}, "arms is 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trajectory(**settings)
