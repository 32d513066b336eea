"""What a run leaves behind: weights written one by one, in shards, of any stage, with a card."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import kdcli.train.export as exporting
from kdcli.command import export as command
from kdcli.errors import ConfigError
from kdcli.store import blueprint
from kdcli.store.shards import Shards
from kdcli.student.hf import HFStudent
from kdcli.train.export import StudentFolder, export
from tests import families, runs
from tests.distributed import run_ranks

CPU = torch.device("cpu")


class Alone:
    """An engine of one process, as far as an export asks it."""

    rank = 0

    def whole(self, parameters: Any) -> Any:
        return nullcontext()

    def gather(self, value: Any) -> list[Any]:
        return [value]


def student_of(model: Any) -> HFStudent:
    student = HFStudent()
    student.adopt(model, families.tokenizer())
    student.settle()
    return student


def exported(model: Any, folder: Path, **run: Any) -> Path:
    distiller = SimpleNamespace(student=student_of(model), terms={})
    folder.mkdir(exist_ok=True)
    return export(distiller, Alone(), folder, {"run": run}, {})  # type: ignore[arg-type]


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_bfloat16_is_what_is_written_unless_asked_otherwise(tmp_path: Path) -> None:
    model = families.model("llama_tied")
    plain, exact = exported(model, tmp_path / "a"), exported(model, tmp_path / "b", export_dtype="fp32")
    assert loaded(plain).dtype == AutoConfig.from_pretrained(plain).dtype == torch.bfloat16
    ids = families.ids()
    torch.testing.assert_close(families.logits(loaded(exact), ids), families.logits(model, ids), rtol=0, atol=0)
    assert torch.equal(loaded(plain).model.norm.weight, model.model.norm.weight.bfloat16())
    size = [(folder / "model.safetensors").stat().st_size for folder in (plain, exact)]
    assert 1.8 < size[1] / size[0] < 2.0


def test_shards_and_their_index_are_what_transformers_and_safetensors_read(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.randn(3, 5 + i) for i in range(9)} | {
        "flag": torch.tensor([True]),
        "n": torch.tensor(7),
    }
    shards = Shards(tmp_path, tensors, limit=200)
    for name, tensor in tensors.items():
        shards.add(name, tensor)
    shards.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files[:2]] == [f"model-0000{i}-of-0000{len(files)}.safetensors" for i in (1, 2)]
    assert not list(tmp_path.glob("*.tmp"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, tensor in tensors.items():
        with safe_open(tmp_path / index["weight_map"][name], "pt") as file:
            assert torch.equal(file.get_tensor(name), tensor)
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_names_that_nobody_announced_find_room_too(tmp_path: Path) -> None:
    shards = Shards(tmp_path, ["a"])
    for number in range(4):
        shards.add(f"unannounced.{number}", torch.ones(2))
    shards.close()
    found = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    assert len(found) == 4


def test_experts_go_out_as_their_architecture_is_published(tmp_path: Path) -> None:
    """transformers holds the experts of a layer in one tensor, and every other reader expects them apart."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=families.ROWS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    model = MixtralForCausalLM(config).eval()
    folder = exported(model, tmp_path / "run", export_dtype="fp32")
    model.save_pretrained(tmp_path / "plain")
    names = set(load_file(folder / "model.safetensors"))
    assert names == set(load_file(tmp_path / "plain/model.safetensors"))
    assert "model.layers.1.block_sparse_moe.experts.2.w1.weight" in names
    torch.testing.assert_close(families.logits(loaded(folder), families.ids()), families.logits(model, families.ids()))


def test_an_export_takes_the_memory_of_one_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the process at their most, beyond those of the model: 100 MB of weights, the largest of them 12 MB."""
    config = families.config("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=6, vocab_size=6144)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cpu")
    weights = list(model.parameters())
    total, largest = (how(p.numel() * p.element_size() for p in weights) for how in (sum, max))
    assert total > 100e6
    before = resident()
    made, most = StudentFolder._cast, [0]

    def cast(self: StudentFolder, tensor: torch.Tensor) -> torch.Tensor:
        result = made(self, tensor)
        most[0] = max(most[0], resident() - before)
        return result

    monkeypatch.setattr(StudentFolder, "_cast", cast)
    exported(model, tmp_path / "run")
    assert (tmp_path / "run/student/model.safetensors").stat().st_size > total / 2
    assert most[0] < 3 * largest


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# ------------------------------------------------------------------------------------------------ runs and checkpoints

LORA = {"_target_": "kdcli.student.lora.LoRA", "path": None, "rank": 2, "dora": True, "dropout": 0.1}
SPLIT = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}}


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (3, 2)])
def test_a_run_of_an_adapter_resumes_exactly_and_any_checkpoint_is_its_student(
    stage: int, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"run__export_dtype": "fp32", "engine__stage": stage, "student": LORA}
    if stage == 3:
        changes["engine__deepspeed"] = SPLIT
    run_dir = runs.write_run(tmp_path / "stopped", **changes)
    assert runs.work(run_dir, ranks=ranks, fault="step.optim:step=4:kill") != [0] * ranks
    assert runs.work(run_dir, ranks=ranks) == [0] * ranks
    if stage == 3:
        whole = runs.write_run(tmp_path / "whole", **changes)
        assert runs.work(whole, ranks=ranks) == [0] * ranks
        assert runs.lines(run_dir) == runs.lines(whole)
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "unused"))
    assert command.main([str(run_dir)]) == 0
    assert f"student: {run_dir}/exports/step-000004 (step 4, fp32)\nnext:    kdcli evaluate student.path=" in (
        capsys.readouterr().out
    )
    ended, last = (load_file(run_dir / name / "model.safetensors") for name in ("student", "exports/step-000004"))
    assert ended.keys() == last.keys()
    for name, tensor in ended.items():
        torch.testing.assert_close(last[name], tensor, rtol=0, atol=1e-7)
    assert command.main([str(run_dir), "--checkpoint", "2", "--to", str(tmp_path / "two"), "--dtype", "bf16"]) == 0
    earlier = loaded(tmp_path / "two")
    assert earlier.dtype == torch.bfloat16
    assert (
        earlier.model.layers[0].mlp.up_proj.weight.float() - last["model.layers.0.mlp.up_proj.weight"]
    ).abs().max() > 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "two").get_vocab()
    assert "| optimizer steps | 2 |" in (tmp_path / "two/README.md").read_text()


def test_what_cannot_be_exported_is_said_before_anything_is_read(tmp_path: Path) -> None:
    def refused(*argv: str) -> str:
        with pytest.raises(ConfigError) as caught:
            command.main(list(argv))
        return str(caught.value)

    assert "which run?" in refused()
    assert "is not a run folder (it has no config.yaml)" in refused(str(tmp_path))
    run_dir = runs.write_run(tmp_path)
    assert "has no checkpoint yet; one is made every run.save_every steps" in refused(str(run_dir))
    (run_dir / "checkpoints/step-000002").mkdir(parents=True)
    assert "has no blueprint folder, because it began before kdcli could export" in refused(str(run_dir))
    (run_dir / blueprint.FOLDER).mkdir()
    (run_dir / blueprint.FOLDER / blueprint.FILE).write_text("{}")
    assert "--checkpoint step-3: " in refused(str(run_dir), "--checkpoint", "step-3")
    assert "did you mean step-000002?" in refused(str(run_dir), "--checkpoint", "step-00002x")
    assert "--to" in refused(str(run_dir), "--to", str(tmp_path))
    assert "invalid choice: 'bf61'" in refused(str(run_dir), "--dtype", "bf61")
    assert "did you mean --dtype?" in refused(str(run_dir), "--dtyp", "bf16")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config | {"verb": "evaluate"}))
    assert "is a run of `kdcli evaluate`, which trains no student" in refused(str(run_dir))


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = runs.write_run(tmp_path)
    assert runs.work(run_dir) == [0]
    shard = run_dir / "checkpoints/step-000004/engine/mp_rank_00_model_states.pt"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert command.main([str(run_dir), "--checkpoint", "latest"]) == 2
    assert "the content is not what was written" in capsys.readouterr().err
    assert not (run_dir / "exports").exists()


def test_the_card_tells_where_a_student_comes_from_and_what_applies_to_it(tmp_path: Path) -> None:
    heldout = runs.heldout(tmp_path)
    run_dir = runs.write_run(tmp_path, evaluation=heldout)
    licences = {"teacher": {"path": "recipes://data/tiny_teacher", "licence": "Apache-2.0"}}
    facts = {
        "command": "kdcli distill +recipe=tiny",
        "versions": {"kdcli": "9.9", "torch": "2"},
        "models": licences,
        "data": [{"path": "owner/prose", "licence": "cc-by-4.0"}],
    }
    (run_dir / "manifest.json").write_text(json.dumps(facts))
    assert runs.work(run_dir) == [0]
    _, front, text = (run_dir / "student/README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["license"] == "apache-2.0"
    assert told["teacher"] == "recipes://data/tiny_teacher"
    assert told["terms"] == "teacher recipes://data/tiny_teacher: Apache-2.0; data owner/prose: cc-by-4.0"
    assert {"library_name", "pipeline_tag", "tags"} <= told.keys()
    last = runs.lines(run_dir)[-1]
    row = next(line for line in text.splitlines() if line.startswith("| heldout/all/ppl |"))
    before, after, teacher = (float(cell) for cell in row.strip("| ").split(" | ")[1:])
    assert after == pytest.approx(last["eval/heldout/all/ppl"], rel=1e-3)
    assert teacher == pytest.approx(last["eval/heldout/all/teacher_ppl"], rel=1e-3)
    assert before > after
    for said in ("kdcli distill +recipe=tiny", "kdcli 9.9, torch 2", "kd (ForwardKL)", "| optimizer steps | 4 |"):
        assert said in text


def gathered(rank_0_fails: bool) -> tuple[str, int]:
    """On every rank: what the export of a model split over the ranks raised, and how many weights this rank wrote."""
    from kdcli.engine.zero import Zero

    engine = Zero(stage=3, precision="fp32", deepspeed=SPLIT)
    engine.start()
    student = student_of(families.model("llama"))
    distiller = torch.nn.Module()
    distiller.student, distiller.terms = student, {}
    engine.prepare(
        distiller,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0),
        lr_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
        micro_size=1,
    )
    folder = Path("here")
    folder.mkdir(exist_ok=True)
    written = [0]
    add = Shards.add

    def counted(self: Shards, name: str, tensor: torch.Tensor) -> None:
        written[0] += 1
        if rank_0_fails and written[0] == 3:
            raise OSError("no space left")
        add(self, name, tensor)

    Shards.add = counted  # type: ignore[method-assign]
    try:
        exporting.export(distiller, engine, folder, {"run": {"export_dtype": "fp32"}}, {})  # type: ignore[arg-type]
    except OSError as error:
        return str(error), written[0]
    return "", written[0]


@pytest.mark.parametrize("fails", [False, True])
def test_rank_0_alone_writes_what_is_split_and_all_hear_of_its_failure(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (first, wrote), (other, nothing) = run_ranks(2, gathered, fails)
    assert nothing == 0
    if fails:
        assert first == other == "no space left"
        assert not (tmp_path / "here/student").exists()
        return
    assert wrote == len(list(families.model("llama").parameters()))
    torch.testing.assert_close(
        families.logits(loaded(tmp_path / "here/student"), families.ids()),
        families.logits(families.model("llama"), families.ids()),
    )
