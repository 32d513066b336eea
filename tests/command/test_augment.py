"""`kdcli augment` against a real server on loopback: errors come first, plans, budgets, signals, resuming."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcli.store import metrics, status
from tests.servers.chat import Asked, ChatServer, echo, serving

ROWS = 12
KEY = "sk-test-0123456789abcdefghij"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving() as made:
        yield made


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    file = tmp_path / "seeds.jsonl"
    rows = [{"prompt": f"Question {i}?", "source": "mine", "license": "CC-BY-4.0"} for i in range(ROWS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(server: ChatServer, *more: str, verb: str = "augment") -> list[str]:
    """Answers to the seeds, then rules."""
    return [
        *(verb, "data.path=seeds.jsonl", "run.dir=run", "+augmentation@augmentation.answer=rollout"),
        *("augmentation.answer.writer=teacher", "+augmentation@augmentation.keep=rules", "+writer@writer.teacher=chat"),
        *(f"writer.teacher.url={server.url}", "writer.teacher.model=small", "writer.teacher.concurrency=1"),
        *("writer.teacher.price_prompt=1000", "writer.teacher.price_completion=2000", *more),
    ]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ a run


def test_a_run_makes_rows_says_how_and_is_complete_when_started_again(
    kdcli, server: ChatServer, seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALL_KEY", KEY)
    arguments = command(server, "writer.teacher.api_key_env=SMALL_KEY")
    done = kdcli(*arguments)
    assert done.code == 0, done.err
    made = rows(tmp_path / "run/rows.jsonl")
    assert len(made) == ROWS == server.asked
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    for told in ("step 1/2 answer", "step 2/2 keep", "next:  kdcli distill data.path=run/rows.jsonl"):
        assert told in done.out

    about = json.loads((tmp_path / "run/manifest.json").read_text())["augmentation"]
    assert about["rows"] == ROWS and about["licences"] == {"CC-BY-4.0": ROWS} and about["sources"] == {"mine": ROWS}
    (entry,) = about["written"]
    assert entry["teacher"] == "small" and entry["rows"] == ROWS and entry["prompt"] == "rollout/plain"
    assert entry["endpoint"] == server.url.split("/")[2]
    assert [step["name"] for step in about["steps"]] == ["answer", "keep"]
    assert about["spent"]["calls"] == ROWS and about["spent"]["cost"] > 0

    kept = [file for file in (tmp_path / "run").rglob("*") if file.is_file() and "rows" not in file.name]
    kept += [tmp_path / "caches/answers.sqlite"]
    for file in kept:
        assert KEY.encode() not in file.read_bytes(), file
        if file.suffix in (".log", ".json", ".yaml") or file.name == "metrics.jsonl":
            assert b"Question" not in file.read_bytes() and b"Answer" not in file.read_bytes(), file
    assert metrics.read(tmp_path / "run")[-1]["augment/calls"] == ROWS
    assert status.read(tmp_path / "run")["state"] == "done"

    again = kdcli(*arguments)
    assert again.code == 0 and "run: already complete; set another run.dir" in again.out
    other = kdcli(
        *arguments, "run.dir=other", "+augmentation@augmentation.rank=judge", "augmentation.rank.writer=teacher"
    )
    assert other.code in (0, 3)  # what the server says is no score
    assert server.asked == ROWS * 2  # the answers came from the store
    changed = kdcli(*arguments, "run.seed=1")
    assert changed.code == 2 and "run.seed: 0 -> 1" in changed.err
    seeds.write_text(json.dumps({"prompt": "Another question?"}) + "\n")
    anew = kdcli(*arguments)
    assert anew.code == 0 and "have changed; steps are done anew" in anew.err
    assert len(rows(tmp_path / "run/rows.jsonl")) == 1


def test_a_dry_run_asks_nobody_writes_nothing_and_counts_right(
    kdcli, server: ChatServer, seeds: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    told = kdcli(*command(server), "budget.max_calls=5", "terms.use=research", "--dry-run")
    assert told.code == 0, told.err
    assert server.asked == 0
    assert sorted(tmp_path.rglob("*")) == before
    (line,) = [line.split() for line in told.out.splitlines() if line.startswith("answer")]
    assert line[:5] == ["answer", str(ROWS), "teacher", str(ROWS), "0"]
    assert f"teacher: small at {server.url.split('/')[2]}" in told.out
    assert f"max_calls=5 is too little: {ROWS} is expected" in told.out
    assert "use=research: nothing conflicts" in told.out
    assert kdcli(*command(server)).code == 0
    stored = kdcli(*command(server), "run.dir=other", "--dry-run")
    (line,) = [line.split() for line in stored.out.splitlines() if line.startswith("answer")]
    assert line[3:5] == ["0", str(ROWS)]


def test_a_budget_ends_the_run_and_resume_goes_on_from_there(
    kdcli, server: ChatServer, seeds: Path, tmp_path: Path
) -> None:
    stopped = kdcli(*command(server, "budget.max_calls=5"))
    assert stopped.code == 1
    assert "budget.max_calls=5 is reached: this run folder spent" in stopped.err
    assert "no step is finished yet; go on with: kdcli resume run budget.max_calls=MORE" in stopped.err
    assert server.asked == 5 and status.read(tmp_path / "run")["state"] == "failed"
    done = kdcli(
        "resume", "run", "budget.max_calls=100", "writer.teacher.concurrency=4", "writer.teacher.price_prompt=1"
    )
    assert done.code == 0, done.err
    assert server.asked == ROWS == len(server.counts)
    assert len(rows(tmp_path / "run/rows.jsonl")) == ROWS
    refused = kdcli("resume", "run", "writer.teacher.model=large")
    assert refused.code == 2 and "writer.teacher.model: 'small' -> 'large'" in refused.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_answered_and_says_how_to_go_on(
    kdcli, seeds: Path, tmp_path: Path, number: int, code: int
) -> None:
    def say(asked: Asked) -> str:
        if server.asked == 4:
            os.kill(os.getpid(), number)
        if server.asked > 4:
            over.wait(2)  # so that the run cannot be over before it looks at its signals
        return echo(asked)

    over = threading.Event()
    with serving(say) as server:
        ended = kdcli(*command(server))
        over.set()
        assert ended.code == code
        assert "interrupted in augmentation.answer" in ended.err and "kdcli resume run" in ended.err
        assert status.read(tmp_path / "run") | {"time": ""} == {
            "state": "interrupted",
            "step": 0,
            "steps": 0,
            "resumable": True,
            "exit_code": code,
            "time": "",
            "reason": status.read(tmp_path / "run")["reason"],
        }
        before = server.asked
        assert before < ROWS
        assert kdcli("resume", "run").code == 0
        assert server.asked == ROWS == len(server.counts)  # nothing that was answered is asked again


def test_one_recipe_serves_both_verbs(kdcli, server: ChatServer, seeds: Path, tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(
        "# A distillation that makes its rows first\n"
        "defaults:\n"
        "  - /writer@writer.student: chat\n"
        "  - /augmentation@augmentation.answer: rollout\n"
        "  - override /student_init: from_config\n"
        "run: {name: both, steps: 3, save_every: 1, resume: never}\n"
        "batch: {size: 2, micro_size: 2}\n"
        "student: {path: recipes://data/tiny_teacher}\n"
        "optimizer: {lr: 1.0e-3}\n"
        "data: {path: seeds.jsonl}\n"
        f"writer: {{student: {{url: '{server.url}', model: '${{student.path}}'}}}}\n"
    )
    done = kdcli("augment", "+recipe=both.yaml", "run.dir=run", "launch.processes=2", "lr_schedule=linear")
    assert done.code == 0, done.err
    import yaml

    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    sections = {"verb", "run", "augment", "budget", "terms", "data", "writer", "augmentation", "report", "launch"}
    assert set(config) == sections
    assert config["run"] == {"name": "both", "dir": "run", "seed": 0, "resume": "never"}
    assert config["writer"]["student"]["model"] == "recipes://data/tiny_teacher"
    assert config["report"] == {} and config["launch"]["processes"] == 1


# -------------------------------------------------------------------------------------------------- bad input


def test_all_that_is_wrong_is_told_at_once_before_anything_is_asked(kdcli, server: ChatServer, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "# A prompt with an unknown field\npaper: none\nuser: '{{ prompt }} {{ nonsense }}'\n"
        "parse: {kind: text}\nexample: fine\n"
    )
    wrong = [
        *(
            "data.path=nowhere.jsonl",
            "augmentation.answer.prompt=rollout/plian",
            "writer.teacher.api_key_env=NO_SUCH_KEY",
        ),
        *("+augmentation@augmentation.more=rollout", "augmentation.more.prompt=bad.yaml"),
        *("+augmentation@augmentation.score=judge", "augmentation.score.writer=teecher"),
        *("+writer@writer.far=chat", "writer.far.url=http://169.254.169.254/v1", "writer.far.model=x"),
    ]
    found = kdcli(*command(server, *wrong))
    assert found.code == 2
    for told in (
        "nowhere.jsonl: there is no such file",
        "augmentation.answer.prompt: there is no prompt rollout/plian",
        "augmentation.more.prompt: bad.yaml names nonsense, which no row has",
        "augmentation.score.writer: asks teecher, which the section `writer` lacks (it has teacher, far); did you mean",
        "writer.teacher.api_key_env: the environment variable NO_SUCH_KEY is not set",
        "writer.far.url: 169.254.169.254 is a link-local address",
    ):
        assert told in found.err, told
    assert server.asked == 0 and not (tmp_path / "run").exists()


BAD = {
    "no step": (["data.path=seeds.jsonl", "run.dir=run"], "augmentation: no step is chosen; add one: +augmentation@"),
    "unknown key": (["budget.max_costs=1"], "budget.max_costs: there is no such key; did you mean budget.max_cost?"),
    "out of range": (["budget.max_calls=-1"], "budget.max_calls: is -1, but must be at least 0"),
    "unknown setting": (["+augmentation.keep.min_char=3"], "did you mean augmentation.keep.min_chars?"),
    "unknown use": (["terms.use=comercial"], "terms.use: is comercial; declare one of research, commercial, competing"),
    "conflict": (["terms.use=competing", "writer.teacher.terms=openai"], "openai (checked"),
    "licence of a source": (
        ["terms.use=commercial", "writer.teacher.license=MIT", "data.path=closed.jsonl"],
        "CC-BY-NC",
    ),
    "purge without age": (["--purge", "x.sqlite"], "--older-than 90"),
    "no store": (["--stats", "x.sqlite"], "x.sqlite: there is no store of answers"),
    "missing data": (["data.path=no.jsonl", "terms.use=research"], "error: data: no.jsonl: there is no such file"),
    "bad row": (["data.path=bad.jsonl"], "bad.jsonl:2: prompt must be text, not a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_asked(
    kdcli, server: ChatServer, seeds: Path, tmp_path: Path, case: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    (tmp_path / "closed.jsonl").write_text('{"prompt": "a", "license": "CC-BY-NC-4.0"}\n')
    more, told = BAD[case]
    alone = case == "no step" or more[0].startswith("--")
    found = kdcli(*(["augment", *more] if alone else command(server, *more)))
    assert found.code == 2 and told in found.err, found.err
    assert server.asked == 0 and not (tmp_path / "run").exists()


def test_a_missing_package_is_told_before_anything_is_asked(
    kdcli, server: ChatServer, seeds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    more = ["+augmentation@augmentation.find=retrieve", "augmentation.find.documents=seeds.jsonl"]
    more += ["+augmentation@augmentation.right=verify", "augmentation.right.method=answer"]
    found = kdcli(*command(server, *more))
    assert found.code == 2 and server.asked == 0
    for told in (
        "find.method=bm25: needs the package bm25s",
        "augmentation.right: comparing mathematical answers needs",
    ):
        assert told in found.err
    assert 'pip install "kdcli[augment]"' in found.err


def test_what_may_matter_is_warned_about(kdcli, server: ChatServer, seeds: Path) -> None:
    spare = ["+writer@writer.judge=chat", f"writer.judge.url={server.url}", "writer.judge.model=x"]
    free = ["writer.teacher.price_prompt=0", "writer.teacher.price_completion=0", "budget.max_cost=1"]
    told = kdcli(*command(server, *spare, *free), "--dry-run")
    assert told.code == 0
    assert "warning: writer.judge: no step asks it" in told.err
    assert "warning: writer.teacher: has no price, so budget.max_cost does not stop it" in told.err
    assert "warning: terms.use is not declared" in told.err and "small at 127.0.0.1" in told.err
    quiet = kdcli(*command(server, "terms.use=research", "terms.acknowledged=[unknown,CC-BY]"), "--dry-run")
    assert quiet.err == ""


def test_an_acknowledged_condition_passes(kdcli, server: ChatServer, seeds: Path) -> None:
    meant = ["terms.use=competing", "writer.teacher.terms=openai", "terms.acknowledged=[openai]"]
    assert kdcli(*command(server, *meant), "--dry-run").code == 0


def test_when_nothing_is_left_the_worst_step_is_named(kdcli, server: ChatServer, seeds: Path, tmp_path: Path) -> None:
    found = kdcli(*command(server, "augmentation.keep.min_words=100"))
    assert found.code == 3
    assert "no row is left: augmentation.keep made 0 of 12" in found.err
    assert len(rows(tmp_path / "run/aside.jsonl")) == ROWS


def test_stats_and_purge_of_the_store(kdcli, server: ChatServer, seeds: Path) -> None:
    assert kdcli(*command(server)).code == 0
    told = kdcli("augment", "--stats", "caches/answers.sqlite").out
    assert "12 of small" in told and "by 1 run folders" in told and "Question" not in told
    assert "0 stored values" in kdcli("augment", "--purge", "caches/answers.sqlite", "--older-than", "1").out
