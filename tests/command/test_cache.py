"""`kdcli cache` writes a store that teacher=cached learns from as from the teacher, whatever happens in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcli.config.check import check
from kdcli.errors import ConfigError
from kdcli.store import signals
from tests import caches, runs

CACHED = {"_target_": "kdcli.teacher.cached.CachedTeacher", "miss": "error", "teacher": None}


def cache(folder: Path, name: str = "cache", *, ranks: int = 1, fault: str = "", **changes: Any) -> list[Any]:
    return runs.work(caches.write_run(folder, name, **changes), ranks=ranks, fault=fault)


def distill(folder: Path, name: str, teacher: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    """The lines of metrics of a run of two steps."""
    own = {"teacher": teacher, "run__steps": 2, "run__save_every": 0, "student_init__config__attention_dropout": 0.0}
    run_dir = runs.write_run(folder, **own, **changes)
    assert runs.work(run_dir) == [0], runs.state(run_dir)
    run_dir.rename(folder / name)
    return runs.lines(folder / name)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole store, in several shards."""
    folder = tmp_path_factory.mktemp("written")
    assert cache(folder) == [0], runs.state(folder / "cache")
    return folder


def test_a_run_from_the_cache_has_the_online_runs_losses(written: Path) -> None:
    """In packed rows and other micro-batches than those that were cached. All of the vocabulary in 32 bits: float32's
    rounding, of two orders of summation."""
    stored = CACHED | {"path": str(written / "store")}
    online, offline = (distill(written, n, t, batch__packing=True) for n, t in (("a", caches.NODE), ("b", stored)))
    assert len(online) == len(offline) == 2
    for one, other in zip(online, offline, strict=True):
        for key in ("loss/total", "loss/kd", "grad_norm"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=1e-4)
    assert not (written / "b/cache").exists()


def test_ranks_write_the_same_store_together(written: Path, tmp_path: Path) -> None:
    assert cache(tmp_path, ranks=2) == [0, 0]
    assert caches.content(tmp_path / "store").keys() == caches.content(written / "store").keys()
    assert len(caches.shards(tmp_path)) > 2
    one, other = (signals.Signals(folder / "store") for folder in (tmp_path, written))
    assert sum(shard.targets for shard in one.shards) == sum(shard.targets for shard in other.shards)


def test_a_killed_writer_loses_its_unfinished_shard_and_no_more(written: Path, tmp_path: Path) -> None:
    assert cache(tmp_path, "killed", fault="cache.batch:step=8:kill") == [None]
    before = caches.shards(tmp_path)
    assert 0 < len(before) < len(caches.shards(written))
    assert cache(tmp_path, "again") == [0]
    after = caches.shards(tmp_path)
    assert before.items() <= after.items()  # nothing is written twice
    assert caches.content(tmp_path / "store").keys() == caches.content(written / "store").keys()
    assert len(signals.Signals(tmp_path / "store")) == sum(
        len(one) for one in signals.Signals(tmp_path / "store").shards
    )


def test_a_full_disk_leaves_what_is_written_usable(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cache(tmp_path, "full", fault="cache.shard:step=1:enospc") == [1]
    told = capfd.readouterr().err
    assert "error: no space left on the disk of" in told and "run the same command again" in told
    assert "Traceback" not in told
    store = signals.Signals(tmp_path / "store")
    assert len(store.shards) == 1 and len(store) > 0
    assert store.read([0], [store.block(0)[0]]).target.size > 0


def test_an_interrupted_writer_keeps_everything(tmp_path: Path) -> None:
    assert cache(tmp_path, "stopped", fault="cache.batch:step=3:term") == [143]
    assert "saved; go on with the same command" in runs.state(tmp_path / "stopped")["reason"]
    assert len(signals.Signals(tmp_path / "store")) == 6  # three rounds of two rows, the third of them finished


def test_a_damaged_shard_alone_is_written_again(written: Path, tmp_path: Path) -> None:
    assert cache(tmp_path, "first") == [0]
    before = caches.shards(tmp_path)
    name = sorted(before)[1]
    file = tmp_path / "store/shards" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"shard {name} .*run the same `kdcli cache` again"):
        caches.content(tmp_path / "store")
    assert cache(tmp_path, "again") == [0]
    after = caches.shards(tmp_path)
    assert {one: after[one] for one in before if one != name} == {one: before[one] for one in before if one != name}
    assert caches.content(tmp_path / "store").keys() == caches.content(written / "store").keys()


def test_more_data_and_more_targets_are_added(tmp_path: Path) -> None:
    caches.write_run(tmp_path, "unused")
    file = tmp_path / "data/prose.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:5]))
    assert cache(tmp_path, "some") == [0]
    some = len(signals.Signals(tmp_path / "store"))
    file.write_text("".join(reversed(whole.splitlines(keepends=True))))
    assert cache(tmp_path, "all") == [0]
    store = signals.Signals(tmp_path / "store")
    assert len(store) > some == 5 + 12
    assert len(store) == sum(map(len, store.shards))  # what was there is not asked again


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cache__temperature": 2.0}, r"another temperature \(1.0, not 2.0\)"),
        ({"cache__bits": 8}, r"another codec \(topk k=4096 bits=32 .*, not .* bits=8 .*\)"),
        ({"teacher__dtype": "bfloat16"}, r"another dtype \(float32, not bfloat16\)"),
        ({"student__chat_template": "{{ messages }}"}, "another chat template"),
    ],
)
def test_a_store_of_something_else_is_refused_before_weights_load(
    written: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    run_dir = caches.write_run(tmp_path, cache__path=str(written / "store"), **changes)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=f"cache.path: .* holds the signal of {told}; set another"):
        check(config)


def test_a_store_of_another_teacher_or_tokenizer_is_refused(written: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    manifest = json.loads((written / "store/manifest.json").read_text())
    for name, told in (("teacher", "another teacher"), ("tokenizer", "another tokenizer")):
        (store / "manifest.json").write_text(json.dumps(manifest | {name: "0" * 32}))
        config = yaml.safe_load((caches.write_run(tmp_path, name) / "config.yaml").read_text())
        with pytest.raises(ConfigError, match=told):
            check(config)


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    config = yaml.safe_load(
        (caches.write_run(tmp_path, cache__path=str(tmp_path / "data")) / "config.yaml").read_text()
    )
    with pytest.raises(ConfigError, match="holds files, but no cache"):
        check(config)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"objective": {"kd": {"_target_": "kdcli.objective.forward_kl.ForwardKL", "temperature": 2.0}}},
            "temperature",
        ),
        ({"objective": {"kd": {"_target_": "kdcli.objective.sampled.Sampled"}}}, "cache.codec=sampled"),
        ({"objective": {"kd": {"_target_": "kdcli.objective.hidden_mse.HiddenMSE"}}}, "needs the teacher's hidden"),
        ({"teacher__miss": "compute"}, "needs the teacher itself"),
        ({"teacher__path": "nowhere/store"}, "there is no cache of a teacher here"),
        ({"student__chat_template": "{{ messages }}"}, "another chat template than the student's"),
    ],
)
def test_a_run_that_the_store_does_not_serve_is_refused(
    written: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    stored = CACHED | {"path": str(written / "store")}
    config = runs.config(
        **{"data__path": str(written / "data"), "teacher": stored, "run__dir": str(tmp_path), **changes}
    )
    with pytest.raises(ConfigError, match=told):
        check(config)


def test_a_truncated_shard_is_told_before_weights_load(written: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / "shards").mkdir(parents=True)
    for file in (written / "store").rglob("*"):
        if file.is_file() and file.name != ".lock":
            (store / file.relative_to(written / "store")).parent.mkdir(exist_ok=True)
            (store / file.relative_to(written / "store")).write_bytes(file.read_bytes())
    name = sorted(signals.shard_names(store))[0]
    (store / "shards" / name).write_bytes((store / "shards" / name).read_bytes()[:-9])
    config = runs.config(
        data__path=str(written / "data"), teacher=CACHED | {"path": str(store)}, run__dir=str(tmp_path)
    )
    with pytest.raises(ConfigError, match=rf"the shard {name} has [\d,]+ of [\d,]+ bytes; run the same"):
        check(config)


def test_stats_and_verify(written: Path, kdcli) -> None:
    store = str(written / "store")
    found = kdcli("cache", "--stats", store, f"data.path={written / 'data'}", "batch.max_length=32")
    assert found.code == 0, found.err
    flat = " ".join(found.out.split())
    for told in ("topk: k 4096 bits 32", "24 of 24 rows", "KL(teacher || store)", "as they were written"):
        assert told in flat
    assert kdcli("cache", f"--verify={store}").code == 0
    assert kdcli("cache", "--stats").code == 2
    assert "there is no cache" in kdcli("cache", "--stats", str(written)).err
    assert "+recipe" in kdcli("cache", "--help").out
