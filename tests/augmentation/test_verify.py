import pytest

from kdcli.api import Example
from kdcli.augmentation import _programs
from kdcli.augmentation._answers import letter
from kdcli.augmentation._math import MathVerify
from kdcli.augmentation._sandbox import run_python
from kdcli.augmentation.verify import Verify
from kdcli.errors import ConfigError
from tests.desks import FakeDesk, run


def row(response, **meta):
    return Example(prompt="q", response=response, meta=meta)


def correct(rows, **settings):
    return [one.meta.get("correct") for one in run(Verify(mark=True, **settings), rows)]


def test_mathematics_is_compared_by_value():
    """Fractions, decimals, thousands and LaTeX of one number are one answer; another number is not."""
    rows = [
        row(r"Half of it, so \boxed{\frac{1}{2}}.", answer="0.5"),
        row("That makes 1,000 in all.\nThe answer is 1000.", answer="1,000"),
        row("#### 72", answer="72"),
        row("The final answer is $x^2 + 2x + 1$.", answer="(x+1)^2"),
        row("The final answer is 71.", answer="72"),
        row("I cannot tell.", answer="72"),
    ]
    assert correct(rows) == [True, True, True, True, False, False]


def test_wrong_rows_are_set_aside_with_the_reason():
    rows = [row("It is 4.", answer="4"), row("It is 5.", answer="4"), row("Hm.", answer="4"), row("It is 4.")]
    step = Verify()
    assert run(step, rows) == rows[:1]
    assert step.desk.reasons == ["wrong answer", "no answer", "lacks a field"]


def test_a_row_without_gold_passes_unmarked_where_marks_are_wanted():
    assert correct([row("It is 4.", answer="4"), row("It is 4.")]) == [True, None]


def test_extract_takes_the_last_match():
    rows = [row("A: 3. No, A: 4.", answer="4"), row("A: 4. No, A: 3.", answer="4"), row("4", answer="4")]
    assert correct(rows, extract=r"A: (\d+)") == [True, False, False]


def test_text_is_compared_whatever_its_case_and_spaces():
    rows = [row(" the  Eiffel Tower.", answer="The Eiffel tower"), row("The tower", answer="The Eiffel tower")]
    assert correct(rows, method="exact") == [True, False]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("The answer is (B).", "B"),
        ("(A) is wrong, so the answer is **C**", "C"),
        ("B", "B"),
        ("C) because it is warm", "C"),
        (r"\boxed{D}", "D"),
        ("A cat is what I see.", None),
        ("The answer is a cat.", None),
        ("Of (A) and (D) I take (D).", "D"),
    ],
)
def test_a_choice_is_the_letter_that_is_named(text, chosen):
    assert letter(text) == chosen


def test_choices_are_verified():
    assert correct([row("(B)", answer="b"), row("(B)", answer="(C)")], method="choice") == [True, False]


def test_unit_tests_run_against_the_code_block():
    tests = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
    rows = [
        row("Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", tests=tests),
        row("```python\ndef add(a, b):\n    return a - b\n```", tests=tests),
        row("```python\ndef add(a, b):\n    return a + b\nraise SystemExit(0)\n```", tests="\n".join(tests)),
        row("```python\nimport time\ndef add(a, b):\n    time.sleep(60)\n```", tests=tests),
        row("```python\ndef add(a, b): return a + b\nif __name__ == '__main__':\n    input()\n```", tests=tests),
        row("```js\nlet x\n```", tests=tests),
    ]
    assert correct(rows, method="tests", seconds=1.5) == [True, False, False, False, True, False]


def test_an_early_end_is_no_success():
    """Code that leaves before the tests are reached has not passed them."""
    step = Verify(method="tests")
    leaving = row("```\nimport os\nos._exit(0)\n```", tests="assert False")
    assert run(step, [leaving, row("x = 1", other=1)]) == []
    assert step.desk.reasons == ["tests failed", "no tests"]


def test_what_a_program_prints_is_compared_line_by_line_and_numbers_by_value():
    rows = [
        row("```python\nprint(6 * 7.0)\n```", answer="42"),
        row("```python\nprint('a')\nprint('b')\n```", answer="a\nb\n"),
        row("```python\nprint('a')\n```", answer="a\nb"),
        row("```python\n1 / 0\n```", answer="a"),
        row("print(int(input()) + 1)", answer="42", given="41"),
    ]
    found = correct(rows, method="program", stdin="{{ meta.given if meta.given is defined else '' }}")
    assert found == [True, True, False, False, True]


def test_nothing_is_run_twice(monkeypatch):
    """Not even in one block: what a program printed is what it printed."""
    seen = []
    monkeypatch.setattr(_programs, "run_python", lambda source, **_: seen.append(source) or run_python(source))
    rows = [row("```python\nprint(1)\n```", answer="1")] * 2
    desk = FakeDesk()
    for _ in range(2):
        step = Verify(method="program")
        step.open(desk)
        assert list(step(rows)) == rows
    assert len(seen) == 1


def test_a_comparison_that_never_ends_is_undecided_and_the_next_one_works():
    """9^(9^(9^9)) has more digits than memory; only the end of its process ends it."""
    with MathVerify(seconds=0.5) as math:
        assert math.compare("9**9**9**9", "1") == "undecided"
        assert math.compare("1/2", "0.5") == "right"
        assert math.answer("so it is 12") == "12"
        assert math.compare("Paris", "1") == "unread"


def test_a_rehearsal_keeps_all_and_runs_nothing():
    rows = [row("It is 5.", answer="4"), row("x")]
    assert run(Verify(), rows, rehearsal=True) == rows
    assert [one.meta["correct"] for one in run(Verify(mark=True), rows, rehearsal=True)] == [True, True]


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match=r"verify\.method"):
        Verify(method="guess")  # pyright: ignore
    with pytest.raises(ConfigError, match=r"verify\.extract"):
        Verify(extract="(")
    with pytest.raises(ConfigError, match="names answer, which no row has"):
        Verify(gold="{{ answer }}")
