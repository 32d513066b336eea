"""Black-box distillation, whole: a served teacher, seeds to a trained student; killed at random, the same files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.servers.chat import TINY, ChatServer, serving

pytestmark = pytest.mark.slow

KEY = "sk-black-box-3f9c2d7e51a84b60"
SMALL = [
    "run.steps=3",
    "run.dir=runs/black_box",
    "writer.teacher.model=tiny",
    "writer.teacher.max_tokens=48",
    "writer.teacher.price_prompt=1.0",
    "writer.teacher.price_completion=3.0",
    "writer.teacher.api_key_env=BLACK_BOX_KEY",
    "augmentation.expand.count=6",
    "augmentation.expand.per_call=2",
    "augmentation.expand.wave=3",
    "augmentation.label.allow_truncated=true",  # a model of 4M parameters rarely comes to an end
    "augmentation.rules.min_words=1",
    "augmentation.good.threshold=0",  # nor does it judge well
    "batch.size=4",
    "batch.max_length=64",
    "evaluation.heldout.rows=2",
    "evaluation.heldout.max_length=64",
]


@pytest.fixture(scope="module")
def server() -> Any:
    """The packaged model, held to forms, behind HTTP."""
    with serving(model=TINY, key=KEY) as serving_:
        yield serving_


def command(server: ChatServer) -> list[str]:
    return ["distill", "+recipe=black_box", f"writer.teacher.url={server.url}", *SMALL]


def made(folder: Path) -> dict[str, bytes]:
    """What the augmentation wrote, by name: its rows and all that it set aside, step by step."""
    (augmented,) = (folder / "caches" / "augmented").glob("*/rows.jsonl")
    files = [one for one in augmented.parent.rglob("*.jsonl") if one.name in ("rows.jsonl", "aside.jsonl")]
    return {one.relative_to(augmented.parent).as_posix(): one.read_bytes() for one in files}


def killed_at_random(arguments: list[str], folder: Path, server: ChatServer, chance: random.Random) -> int:
    """Start the command in a process of its own and kill -9 it and its workers at a random moment; its exit code."""
    environment = {**os.environ, "BLACK_BOX_KEY": KEY}
    process = subprocess.Popen(
        [sys.executable, "-m", "kdcli", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    moment = server.asked + chance.randint(1, 8)  # after so many more questions, and then any time of half a second
    while process.poll() is None and server.asked < moment:
        time.sleep(0.01)
    time.sleep(chance.random() / 2)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def test_seeds_become_a_student_and_kills_change_nothing(
    kdcli, server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLACK_BOX_KEY", KEY)
    result = kdcli(*command(server))
    assert result.code == 0, result.err
    asked = server.asked
    files = made(tmp_path)
    rows = [json.loads(line) for line in files["rows.jsonl"].splitlines()]
    assert rows
    for row in rows:
        assert row["prompt"] and row["response"]
        written = row["meta"]["written"]
        assert list(dict.fromkeys(one["step"] for one in written)) == ["expand", "label", "judge"]
        assert all(one["teacher"] == "tiny" and one["endpoint"] == server.url.split("/")[2] for one in written)
        assert all(one["date"] and one["template"] and one["terms"] for one in written)
        assert row["meta"]["parents"] and row["meta"]["license"] == "CC0-1.0" and row["meta"]["source"]
        assert 0 <= row["score"] <= 10
    lines = runs.lines(Path("runs/black_box"))
    assert [line["step"] for line in lines if "loss/total" in line] == [1, 2, 3]
    before, after = (next(line for line in part if "eval/heldout/all/ppl" in line) for part in (lines, lines[::-1]))
    assert after["eval/heldout/all/ppl"] < before["eval/heldout/all/ppl"]
    assert Path("runs/black_box/student/model.safetensors").exists()
    assert not leaks(tmp_path, result.out + result.err)

    again = tmp_path / "again"
    again.mkdir()
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    print(f"seed of the kills: {seed}")
    server.forget()
    codes = [killed_at_random(command(server), again, server, chance) for _ in range(2)]
    assert -signal.SIGKILL in codes, codes
    monkeypatch.chdir(again)
    result = kdcli(*command(server))
    assert result.code == 0, result.err
    assert made(again) == files
    assert runs.lines(Path("runs/black_box")) == lines
    assert server.asked <= asked + len(codes) * 16  # what was under way when it was killed, at most
    assert not leaks(again, result.out + result.err)

    server.forget()
    result = kdcli(*command(server), "run.dir=runs/other", "objective.kd.weight=0.5")
    assert result.code == 0, result.err
    assert server.asked == 0  # the rows are there, and another training reads them


def leaks(folder: Path, told: str) -> list[str]:
    """Files and messages that hold the key."""
    found = [str(one) for one in folder.rglob("*") if one.is_file() and KEY.encode() in one.read_bytes()]
    return found + (["the terminal"] if KEY in told else [])
