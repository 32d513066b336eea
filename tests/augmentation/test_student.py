import pytest

from kdcli.api import Example
from kdcli.augmentation.student import Student
from kdcli.errors import ConfigError
from tests.desks import run


def answer(group, by, correct=None, score=None):
    meta = {"by": by} | ({} if correct is None else {"correct": correct})
    return Example(prompt=group, response=f"{group} {by}", group=group, score=score, meta=meta)


def test_what_the_student_fails_is_kept_with_the_teachers_answer():
    rows = [
        answer("hard", "teacher", True),
        answer("hard", "student", False),
        answer("easy", "teacher", True),
        answer("easy", "student", True),
        answer("half", "data"),
        answer("half", "student", True),
        answer("half", "student", False),
    ]
    step = Student()
    assert run(step, rows) == [rows[0], rows[4]]
    assert step.desk.reasons.count("the student can") == 2


def test_a_gap_of_scores_is_between_means():
    rows = [answer("a", "teacher", score=8.0), answer("a", "student", score=6.0), answer("a", "student", score=8.0)]
    assert run(Student(measure="score"), rows) == rows[:1]
    assert run(Student(measure="score", gap=1.0), rows) == rows[:1]
    assert run(Student(measure="score", gap=1.1), rows) == []


def test_prompts_are_kept_once_without_what_was_said_of_answers():
    rows = [answer("a", "teacher", True, 3.0), answer("a", "student", False, 1.0)]
    (kept,) = run(Student(keep="prompts"), rows)
    assert kept == Example(prompt="a", meta={})


def test_groups_that_cannot_be_told_are_set_aside_with_the_reason():
    step = Student()
    assert run(step, [answer("a", "teacher", True)]) == []
    assert run(step, [answer("b", "student", False)]) == []
    assert step.desk.reasons == ["no teacher answer"]
    assert run(step, [answer("c", "teacher"), answer("c", "student")]) == []
    assert step.desk.reasons == ["no score"] * 2


def test_a_rehearsal_keeps_every_group():
    rows = [answer("a", "teacher", True), answer("a", "student", True)]
    assert run(Student(), rows, rehearsal=True) == rows[:1]


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match=r"student\.measure"):
        Student(measure="length")  # pyright: ignore
