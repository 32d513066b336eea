"""How well the ways to ask one teacher agree: loss and student gradient of one batch, against the model held locally.

    python -m benchmarks.agreement [--write] [--teacher PATH] [--data PATH] [--rows 8] [--length 64]

Every way is asked through its option's YAML file, with the same rows, student and objective (forward KL): the model
whole in one process, its parameters split over two, streamed from a disk, read from a cache that `kdcli cache` wrote,
asked through HTTP on loopback, mixed with itself. Prints the difference of
loss and gradient next to the bound that is claimed, and exits 1 where one is missed. `--write` puts the table into
docs/teachers.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from kdcli.api import Batch, Need, Teacher
from kdcli.cli import main as main_of_kdcli
from kdcli.config.build import build
from kdcli.data.jsonl import Jsonl
from kdcli.engine.zero import Zero
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.sampled import Sampled
from kdcli.store import paths
from kdcli.student.hf import HFStudent
from kdcli.student_init.from_config import FromConfig
from kdcli.text.collate import collate
from kdcli.text.tokenize import encode
from kdcli.train.distiller import Distiller
from tests.distributed import run_ranks
from tests.servers.prompt_logprobs import serving

PAGE = Path(__file__).resolve().parents[1] / "docs" / "teachers.md"
BEGIN, END = "<!-- agreement: begin -->\n", "<!-- agreement: end -->\n"
Node = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """The model asked, and the rows it is asked about."""

    teacher: str
    data: str
    rows: int = 8
    length: int = 64


@dataclass(frozen=True)
class Found:
    """What one way of asking gives."""

    loss: float
    gradient: torch.Tensor  # [P] float64, of all the student's parameters
    held: int  # bytes of the teacher's parameters that a process holds when it answers
    provides: str


@dataclass(frozen=True)
class Way:
    """One way of asking, and how far from the local model it may be."""

    name: str
    ask: Callable[[Setting, Path], Found]
    reference: str  # the way it is compared with
    loss: float  # greatest relative difference
    gradient: float  # likewise, of norms
    below: bool = False  # of the K likeliest ids and the rest: the loss is at most the whole vocabulary's


def option(name: str, **settings: Any) -> dict[str, Any]:
    """The node of `configs/teacher/NAME.yaml` with some settings changed."""
    node = yaml.safe_load((paths.configs() / "teacher" / f"{name}.yaml").read_text("utf-8"))
    return {key: value for key, value in node.items() if key != "defaults"} | settings


def few(setting: Setting, file: Path) -> Path:
    """The first examples of each domain, as many as there are rows at most; a cache is written for all of them."""
    domains = Jsonl(path=setting.data).domains()
    with file.open("w", encoding="utf-8") as out:
        for name, examples in domains.items():
            for example in islice(examples, -(-setting.rows // len(domains))):
                told = {field.name: getattr(example, field.name) for field in fields(example)} | {"domain": name}
                out.write(json.dumps({key: value for key, value in told.items() if value and key != "where"}) + "\n")
    return file


def rows_of(setting: Setting, tokenizer: Any) -> Batch:
    data = Jsonl(path=setting.data)
    rows, _ = encode(data, tokenizer, max_length=setting.length, packing=False, overflow="split")
    every = [row for name in sorted(rows) for row in rows[name][: setting.rows]]
    return collate(every[:: max(1, len(every) // setting.rows)][: setting.rows], pad_id=0)


def student_of(setting: Setting, teacher: Teacher, device: torch.device) -> HFStudent:
    """A student with random weights, the teacher's architecture at half its depth, the same everywhere."""
    student = HFStudent()
    student.device = device
    tokenizer_only = build(option("hf", path=setting.teacher), Teacher)
    layers = tokenizer_only.shape().layers  # pyright: ignore[reportOptionalMemberAccess]
    overrides = {"num_hidden_layers": max(1, layers // 2)}
    FromConfig(config=setting.teacher, overrides=overrides)(student, tokenizer_only)
    return student


def answer(setting: Setting, node: Node, *, sampled: bool = False) -> Found:
    """Loss and gradient of the student with the teacher that `node` describes, on this rank."""
    engine = Zero(stage=0, precision="fp32")
    engine.start()
    try:
        teacher = build(node, Teacher)
        teacher.place(engine)
        teacher.load(engine.device)
        student = student_of(setting, teacher, engine.device)
        teacher.follow(student)
        batch = rows_of(setting, student.tokenizer).to(engine.device)
        distiller = Distiller(student, teacher, {"kd": Sampled() if sampled else ForwardKL()}).eval()
        loss, _ = distiller(batch, distiller.count(batch))
        loss.backward()
        gradients = [p.grad.double().flatten().cpu() for p in student.model.parameters() if p.grad is not None]
        provides = ", ".join(str(flag.name).lower() for flag in Need if flag in teacher.provides)
        return Found(float(loss.detach()), torch.cat(gradients), held_by(teacher), provides)
    finally:
        engine.close()


def held_by(teacher: Any) -> int:
    """Bytes of the parameters that this process holds for a teacher, whatever keeps them."""
    models = [getattr(teacher, name, None) for name in ("frozen", "model", "copy")]
    model = next((one for one in models if isinstance(one, torch.nn.Module)), None)
    head = getattr(teacher, "head", None)
    seen: dict[int, int] = {}
    for parameter in list(model.parameters()) if model is not None else []:
        part = getattr(parameter, "ds_tensor", parameter)
        if part.device.type != "meta" and part.numel():
            seen[part.data_ptr()] = part.numel() * part.element_size()
    if head is not None and head.weight.device.type != "meta":
        seen[head.weight.data_ptr()] = head.weight.numel() * head.weight.element_size()
    nested = getattr(teacher, "teachers", None) or {}
    return sum(seen.values()) + sum(held_by(one) for one in dict(nested).values())


# ------------------------------------------------------------------------------------------------------ ways of asking


def local(setting: Setting, folder: Path, *, dtype: str = "float32", sampled: bool = False) -> Found:
    return answer(setting, option("hf", path=setting.teacher, dtype=dtype), sampled=sampled)


def split(setting: Setting, folder: Path, *, name: str = "hf_sharded", dtype: str = "float32") -> Found:
    """Two processes, of which all must find the same."""
    found = run_ranks(2, answer, setting, option(name, path=setting.teacher, dtype=dtype))
    if not torch.equal(found[0].gradient, found[1].gradient):
        raise RuntimeError(f"{name}: two processes that were given the same rows found different gradients")
    return found[0]


def streamed(setting: Setting, folder: Path) -> Found:
    return answer(setting, option("hf_offloaded", path=setting.teacher, dtype="float32", offload="disk"))


def cached(setting: Setting, folder: Path, *, sampled: bool = False, **settings: Any) -> Found:
    """Written by `kdcli cache`, for the data set as a whole."""
    store = folder / "-".join(["cache", *(f"{key}{value}" for key, value in sorted(settings.items()))])
    changes = {"path": str(store), **settings}
    command = ["cache", f"teacher.path={setting.teacher}", "teacher.dtype=float32", "engine.precision=fp32"]
    command += [f"data.path={setting.data}", f"batch.max_length={setting.length}", f"run.dir={store}-run"]
    command += [f"cache.{key}={value}" for key, value in changes.items()]
    if main_of_kdcli(command):
        raise RuntimeError(f"kdcli {' '.join(command)} failed")
    return answer(setting, option("cached", path=str(store)), sampled=sampled)


def served(setting: Setting, folder: Path, *, k: int | None = None) -> Found:
    """A real model behind HTTP on loopback, in a process of its own, that answers as vLLM does."""
    with serving(setting.teacher) as server:
        server.speak("vllm", limit=vocabulary(setting))
        k = k or vocabulary(setting)
        return answer(setting, option("served", url=server.url, model="tiny", tokenizer=setting.teacher, k=k))


def mixed(setting: Setting, folder: Path) -> Found:
    one = option("hf", path=setting.teacher, dtype="float32")
    return answer(setting, option("ensemble", teachers={"one": one, "two": one}))


def vocabulary(setting: Setting) -> int:
    shape = build(option("hf", path=setting.teacher), Teacher).shape()
    assert shape is not None, "a teacher from a path has a shape"
    return shape.vocab_size


LOCAL, LOCAL_16, DRAWN = "hf", "hf, bfloat16", "hf, objective=sampled"
EXACT = (1e-6, 1e-5)  # sums in another order
ROUNDING = 1e-3  # of log-probabilities kept in 8 bits
WAYS = [
    Way(LOCAL, local, LOCAL, *EXACT),
    Way("hf_sharded on 2 processes", split, LOCAL, *EXACT),
    Way("hf_tensor_parallel on 2 processes", partial(split, name="hf_tensor_parallel"), LOCAL, *EXACT),
    Way("hf_offloaded, disk", streamed, LOCAL, 0.0, 0.0),
    Way("ensemble of hf twice", mixed, LOCAL, *EXACT),
    Way("cached, whole vocabulary, 32 bits", partial(cached, codec="topk", k="null", bits=32), LOCAL, *EXACT),
    Way("cached, whole vocabulary, 8 bits", partial(cached, codec="topk", k="null", bits=8), LOCAL, 5e-2, 5e-2),
    Way("cached, top 64, 8 bits", partial(cached, codec="topk", k=64, bits=8), LOCAL, 0.25, 0.15, below=True),
    Way("served, whole vocabulary", served, LOCAL, 1e-5, 1e-4),
    Way("served, top 64", partial(served, k=64), LOCAL, 0.25, 0.15, below=True),
    Way(LOCAL_16, partial(local, dtype="bfloat16"), LOCAL, 2e-2, 5e-2),
    Way("hf_sharded on 2 processes, bfloat16", partial(split, dtype="bfloat16"), LOCAL_16, *EXACT),
    Way(DRAWN, partial(local, sampled=True), DRAWN, *EXACT),
    Way("cached, 50 draws", partial(cached, codec="sampled", sampled=True), DRAWN, 1e-5, 1e-4),
]


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    way: Way
    found: Found
    loss: float  # relative difference, above 0 where the loss is greater than that it is compared with
    gradient: float

    @property
    def held(self) -> bool:
        """Whether the bound was kept."""
        highest = ROUNDING if self.way.below else self.way.loss
        return -self.way.loss <= self.loss <= highest and self.gradient <= self.way.gradient


def measure(setting: Setting, folder: Path, ways: Sequence[Way] = WAYS) -> Iterator[Row]:
    """Ask in each way, the compared ones after those they are compared with, about the first rows of each domain."""
    found: dict[str, Found] = {}
    setting = replace(setting, data=str(few(setting, folder / "rows.jsonl")))
    for way in ways:
        found[way.name] = one = way.ask(setting, folder)
        true = found[way.reference]
        gradient = (one.gradient - true.gradient).norm() / true.gradient.norm()
        yield Row(way, one, (one.loss - true.loss) / abs(true.loss), float(gradient))


HEAD = ("teacher", "provides", "parameters held by a process", "compared with", "loss", "gradient", "bound")


def cells(row: Row, whole: int) -> tuple[str, ...]:
    held = f"{row.found.held / 1e6:.1f} MB ({row.found.held / whole:.2f} x)" if row.found.held else "none"
    bound = f"{row.way.loss:.0e}, {row.way.gradient:.0e}" if row.way.loss else "exact"
    bound += ", not above" if row.way.below else ""
    return (
        row.way.name,
        row.found.provides,
        held,
        row.way.reference,
        f"{row.loss:+.1e}",
        f"{row.gradient:.1e}",
        bound if row.held else f"MISSED {bound}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default="recipes://data/tiny_teacher", help="the model that is asked")
    parser.add_argument("--data", default="recipes://data/mini/valid", help="the rows it is asked about")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--write", action="store_true", help="put the table into docs/teachers.md")
    given = parser.parse_args()
    transformers.logging.disable_progress_bar()
    setting = Setting(str(paths.resolve(given.teacher)), given.data, given.rows, given.length)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(setting, Path(folder)):
            rows.append(row)
            print("  ".join(cells(row, rows[0].found.held)), flush=True)
    lines = [HEAD, ("---",) * len(HEAD), *(cells(row, rows[0].found.held) for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if given.write:
        page = PAGE.read_text("utf-8")
        head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
        PAGE.write_text(f"{head}{BEGIN}{table}{END}{tail}", "utf-8")
    return int(not all(row.held for row in rows))


if __name__ == "__main__":
    from benchmarks import agreement  # by its name, which other processes know it by

    sys.exit(agreement.main())
