import pytest

from kdcli.api import Example
from kdcli.augmentation.execute import Execute
from kdcli.errors import ConfigError
from tests.desks import run


def test_what_a_program_prints_and_why_it_failed_is_kept():
    rows = [
        Example(prompt="a", response="```python\nprint(6 * 7)\n```\nThis prints 42."),
        Example(prompt="b", response="```python\nprint('so far')\nprint([][1])\n```"),
        Example(prompt="c", response="```sh\nls\n```"),
        Example(prompt="d"),
    ]
    step = Execute()
    first, second = run(step, rows)
    assert first.meta == {"output": "42", "error": ""}
    assert second.meta["output"] == "so far" and second.meta["error"].startswith("raised IndexError\nTraceback")
    assert 'File "program.py", line 2' in second.meta["error"]
    assert step.desk.reasons == ["no program", "lacks a field"]


def test_the_last_block_is_the_program():
    example = Example(prompt="a", response="```python\nprint(1)\n```\nbetter:\n```py\nprint(2)\n```\n```json\n{}\n```")
    assert run(Execute(into="printed"), [example])[0].meta["printed"] == "2"


def test_a_rehearsal_runs_nothing():
    example = Example(prompt="a", response="not a program (")
    assert run(Execute(), [example], rehearsal=True)[0].meta == {"output": "", "error": ""}


def test_only_python_is_run():
    with pytest.raises(ConfigError, match="only python is run"):
        Execute(language="bash")  # pyright: ignore
