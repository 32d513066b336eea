"""A run goes on with the data it began with, and with no others; where they lie does not matter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcli.command import runs as command
from kdcli.errors import ConfigError
from kdcli.store.tokens import Segment, SegmentWriter
from tests import runs

DDK = {"_target_": "kdcli.domain_scheduler.ddk.DDK", "interval": 2}


def changed_row(file: Path) -> None:
    """Another word in the fifth row; as many rows and tokens of text as before."""
    lines = file.read_text().splitlines()
    row = json.loads(lines[4])
    lines[4] = json.dumps({"text": row["text"].replace(" saw ", " was ").replace(" the ", " day ", 1)})
    assert json.loads(lines[4]) != row
    file.write_text("".join(line + "\n" for line in lines))


def test_a_changed_row_is_refused_by_domain_and_nothing_is_lost(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = runs.write_run(tmp_path / "whole")
    assert runs.work(whole) == [0]
    run_dir = runs.write_run(tmp_path / "one")
    assert runs.work(run_dir, fault="step.optim:step=3:kill") == [None]
    kept = [
        (path, path.read_bytes()) for path in sorted(run_dir.rglob("*")) if path.suffix in (".json", ".jsonl", ".pt")
    ]
    verse = tmp_path / "one/data/verse.jsonl"
    original = verse.read_text()
    changed_row(verse)
    capfd.readouterr()
    assert runs.work(run_dir) == [2]
    assert "domain verse has other rows than then, though as many" in capfd.readouterr().err
    assert runs.state(run_dir)["resumable"] is True
    for path, content in kept:
        assert path.name in ("status.json", "data_report.json") or path.read_bytes() == content, path
    verse.write_text(original)
    assert runs.work(run_dir) == [0]
    assert runs.lines(run_dir) == runs.lines(whole)


def test_held_out_data_of_their_own_are_looked_at_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs.write_run(tmp_path)
    shutil.copytree(tmp_path / "data", tmp_path / "valid")
    probe = {"data": {"_target_": "kdcli.data.jsonl.Jsonl", "path": str(tmp_path / "valid")}, "rows": 5}
    run_dir = runs.write_run(tmp_path, domain_scheduler=DDK, probe=probe)
    assert runs.work(run_dir, fault="step.optim:step=3:kill") == [None]
    changed_row(tmp_path / "valid/prose.jsonl")
    assert runs.work(run_dir) == [2]
    assert "held-out rows of domain prose have changed" in capfd.readouterr().err


def test_the_same_content_elsewhere_is_the_same_data(tmp_path: Path) -> None:
    run_dir = runs.write_run(tmp_path)
    assert runs.work(run_dir, fault="step.optim:step=3:kill") == [None]
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["data"]["path"] = str(tmp_path / "elsewhere")
    folder = command.open_folder(config, timed=False)
    assert folder.path == run_dir and not folder.complete
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    assert runs.work(run_dir) == [0]


def test_other_content_elsewhere_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run_dir = runs.write_run(tmp_path)
    assert runs.work(run_dir, fault="step.optim:step=3:kill") == [None]
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    changed_row(tmp_path / "elsewhere/verse.jsonl")
    before = (run_dir / "config.yaml").read_bytes()
    config: dict[str, Any] = yaml.safe_load(before)
    config["data"]["path"] = str(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"another config \(data\.path: "):
        command.open_folder(config, timed=False)
    assert (run_dir / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("change", [{"weight": 2.0}, {"key": "other"}, {"rejected": True}, {"score": 1.0}])
def test_the_hash_of_rows_is_of_all_that_is_learned_from(change: dict[str, Any], tmp_path: Path) -> None:
    import numpy as np

    def digest(*segments: Segment) -> str:
        with SegmentWriter(tmp_path / "file.arrow") as writer:
            for segment in segments:
                writer.add(segment)
        return writer.digest

    def one(ids: list[int], **more: Any) -> Segment:
        return Segment(**({"ids": np.array(ids, np.int32), "mask": np.ones(len(ids), bool), "key": "k"} | more))

    assert digest(one([1, 2])) == digest(one([1, 2]))
    assert digest(one([1, 2])) != digest(one([1, 2], **change))
    assert digest(one([1, 2]), one([3])) != digest(one([1]), one([2, 3]))
    assert digest(one([1, 2])) != digest(one([1, 2], mask=np.array([False, True])))
