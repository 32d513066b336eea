"""The pretrained student is left as it was loaded."""

from pathlib import Path

import pytest
import torch

from kdcli.errors import ConfigError
from kdcli.student.hf import HFStudent
from kdcli.student_init.pretrained import Pretrained
from kdcli.teacher.none import NoTeacher
from tests import families


def test_nothing_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kdcli")
    student = HFStudent(path=families.folder(tmp_path))
    student.load(torch.device("cpu"))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    Pretrained()(student, NoTeacher())
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert "student: pretrained, 4 layers, 0.03M parameters" in caplog.messages


def test_a_student_without_a_path_is_an_error() -> None:
    student = HFStudent()
    student.load(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"needs student\.path"):
        Pretrained()(student, NoTeacher())
