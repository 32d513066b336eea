"""Losses of student and teacher on every example, as a file that `data=selected` chooses by."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO

import torch

from kdcli.api import Batch, Data, Evaluator, Subject
from kdcli.errors import ConfigError
from kdcli.store import atomic
from kdcli.store.tokens import TokenRows
from kdcli.text.collate import collate
from kdcli.text.tokenize import encode

FIELDS = ("tokens", "student", "teacher")


class RowScores(Evaluator):
    """Writes one JSON line per example into `file` of the run folder, in the data's order:

        {"key": …, "domain": …, "tokens": targets, "student": nats, "teacher": nats, "difference": student - teacher}

    Nats are sums over the example's targets, that is -log p; a document that was split counts whole. `key` is the hash
    of the content, so that the line is found again wherever the example lies. Without a teacher `teacher` and
    `difference` are null. The file is replaced each time the evaluation runs, and is there only when whole.

    Metrics are, per domain and for `all`, the number of `rows` and nats per target (`student`, `teacher`,
    `difference`). The difference is log p_teacher - log p_student per example: MiniPLM's difference sampling
    (arXiv:2410.17215) when the evaluated model is a small reference model.
    """

    def __init__(
        self, *, data: Data, file: str = "row_scores.jsonl", max_length: int = 512, micro_size: int = 4
    ) -> None:
        for name, value, least in (("max_length", max_length, 2), ("micro_size", micro_size, 1)):
            if value < least:
                raise ConfigError(f"evaluation: row_scores' {name} is {value}; give at least {least}")
        if Path(file).name != file or file in ("", ".", ".."):
            raise ConfigError(f"evaluation: row_scores' file is {file!r}; give a name, without folders")
        self.data = data
        self.file = file
        self.max_length = max_length
        self.micro_size = micro_size

    def __call__(self, subject: Subject, step: int) -> dict[str, float]:
        del step
        rows, _ = encode(self.data, subject.tokenizer, max_length=self.max_length, overflow="split", **subject.reading)
        if "all" in rows:
            raise ConfigError("evaluation: a domain cannot be called 'all', which names their pool; rename it")
        sums: dict[str, float] = defaultdict(float)
        with _replaced(subject.folder / self.file, subject.rank == 0) as file:
            example: dict[str, float | str | None] = {}
            for domain, key, part in self._scored(subject, rows):
                if "#" not in key:  # not a further part of the one before
                    _write(file, example)
                    example = {"key": key, "domain": domain, "tokens": 0.0, "student": 0.0, "teacher": 0.0}
                    sums[f"{domain}/rows"] += 1
                for name in FIELDS:
                    example[name] = _plus(example[name], part.get(name))
                    sums[f"{domain}/{name}"] += part.get(name, 0.0)
                with_teacher = "teacher" in part
            _write(file, example)
        return _metrics(list(rows), sums, with_teacher)

    def _scored(
        self, subject: Subject, rows: Mapping[str, TokenRows]
    ) -> Iterator[tuple[str, str, Mapping[str, float]]]:
        """(domain, key, sums of one row) in order, on every rank; each scores its share, and as often as the others."""
        places = ((name, index) for name, part in rows.items() for index in range(len(part)))
        blank = _blank(next(iter(rows.values())))
        while block := list(islice(places, self.micro_size * subject.world_size)):
            first = self.micro_size * subject.rank
            mine = [rows[name][index] for name, index in block[first : first + self.micro_size]]
            batch = collate(mine, pad_id=subject.tokenizer.pad_token_id or 0) if mine else blank
            known = _row_sums(subject, batch)
            local = {f"{n}/{name}": 0.0 for n in range(len(block)) for name in known}
            for number in range(len(mine)):
                local |= {f"{first + number}/{name}": values[number] for name, values in known.items()}
            total = subject.sum(local)
            for number, (domain, index) in enumerate(block):
                key = rows[domain][index].segments[0].key
                yield domain, key, {name: total[f"{number}/{name}"] for name in known}


def _row_sums(subject: Subject, batch: Batch) -> dict[str, list[float]]:
    """tokens, student and, where there is one, teacher: nats of each row."""
    scores = subject.score(batch)
    columns = {"tokens": batch.mask, "student": scores.nll, "teacher": scores.teacher_nll}  # [B, T]
    return {name: v.double().sum(dim=1).tolist() for name, v in columns.items() if v is not None}


def _blank(rows: TokenRows) -> Batch:
    """What a rank scores that has no row of a block: every rank must score equally often."""
    batch = collate([rows[0]], pad_id=0)
    return replace(batch, mask=torch.zeros_like(batch.mask))


def _plus(one: float | str | None, other: float | None) -> float | None:
    return None if other is None or not isinstance(one, float) else one + other


def _write(file: IO[str] | None, example: Mapping[str, float | str | None]) -> None:
    """One line; nothing on other ranks than the first, and for what has not begun."""
    if file is None or not example:
        return
    student, teacher = example["student"], example["teacher"]
    difference = None if teacher is None else student - teacher  # type: ignore[operator]
    line = {**example, "tokens": int(example["tokens"]), "difference": difference}  # type: ignore[arg-type]
    file.write(json.dumps(atomic.json_safe(line), allow_nan=False) + "\n")


@contextmanager
def _replaced(path: Path, wanted: bool) -> Iterator[IO[str] | None]:
    """A file to write that takes its name when it is whole; None where this rank writes nothing."""
    if not wanted:
        yield None
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            yield file
        atomic.fsync_file(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    atomic.fsync_folder(path.parent)


def _metrics(names: Sequence[str], sums: Mapping[str, float], with_teacher: bool) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in [*names, "all"]:
        pool = names if name == "all" else [name]
        rows, tokens, student, teacher = (sum(sums[f"{one}/{key}"] for one in pool) for key in ("rows", *FIELDS))
        metrics |= {f"{name}/rows": rows, f"{name}/student": student / tokens}
        if with_teacher:
            metrics |= {f"{name}/teacher": teacher / tokens, f"{name}/difference": (student - teacher) / tokens}
    return metrics
