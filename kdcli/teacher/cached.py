"""A teacher that has spoken already: its top-k or drawn log-probabilities, read from a store by content."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from kdcli.api import Batch, Engine, Need, Objective, Student, Teacher, TeacherSignal, TopK, Whole
from kdcli.errors import ConfigError
from kdcli.store.models import load_tokenizer
from kdcli.store.signals import Signals, template_hash
from kdcli.store.signals_capture import capture
from kdcli.store.signals_codec import Decoded
from kdcli.store.signals_keys import Sequence as OfBatch
from kdcli.store.signals_keys import as_keys, sequences_of, wanted_of

log = logging.getLogger(__name__)

LINES = ("input_ids", "targets", "mask", "attention_mask", "segment", "position_ids", "old_logprobs")  # one row each
OF_TOKENS = Need.DISTRIBUTION | Need.LOGPROBS


class CachedTeacher(Teacher):
    """Reads what `kdcli cache` wrote to `path`: `topk` [B, T, K] at the store's temperature, and `logprobs` [B, T].

    A sequence is found by its tokens, in any order, batch or packed row; it hits if all of its supervised targets are
    stored. `miss` says what happens else: `error`, or `compute`, which asks `teacher`, the very teacher of the store,
    and codes its answer alike, so that the numbers are those of a hit. What is computed is not stored. Raises
    ConfigError where there is no store, or `teacher` is another one.
    """

    def __init__(
        self, *, path: str, miss: Literal["error", "compute"] = "error", teacher: Teacher | None = None
    ) -> None:
        self.path = path
        self.miss = miss
        self.teacher = teacher
        self.store = Signals(path)
        self.temperature = self.store.identity.temperature
        self.provides = OF_TOKENS
        if miss == "compute" and teacher is None:
            raise ConfigError(
                "teacher.miss: compute needs the teacher itself; add +teacher@teacher.teacher=hf "
                "teacher.teacher.path=…, or set teacher.miss=error"
            )
        self._engine: Engine | None = None

    def load_tokenizer(self) -> Any:
        """The one whose ids the store holds, as it was saved with it."""
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.store.tokenizer_path)
        return self.tokenizer

    def problems_with(self, tokenizer: Any, objectives: Iterable[tuple[str, Objective]]) -> list[str]:
        """Why the store does not serve a run whose student has this tokenizer, found out before weights load; one
        sentence each."""
        return [
            *self._unlike_nested(),
            *self._unlike_template(tokenizer),
            *(problem for where, one in objectives for problem in self._unlike_codec(where, one)),
            *self._damaged(),
        ]

    def load(self, device: torch.device) -> None:
        self.load_tokenizer()
        if problems := [*self._unlike_nested(), *self._damaged()]:
            raise ConfigError(*problems)
        if self.teacher is not None and self.miss == "compute":
            self.teacher.load(device)

    def place(self, engine: Engine) -> None:
        if self.teacher is not None and self.miss == "compute":
            self._engine = engine
            self.teacher.place(engine)

    def fingerprint(self) -> str:
        one = self.store.identity
        return xxhash.xxh3_128_hexdigest(repr([one.teacher, one.temperature, sorted(one.codec.items())]).encode())

    def follow(self, student: Student) -> None:
        if self.teacher is not None and self.miss == "compute":
            self.teacher.follow(student)

    def after_step(self, student: Student, step: int, whole: Whole) -> None:
        if self.teacher is not None and self.miss == "compute":
            self.teacher.after_step(student, step, whole)

    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        """Raises ConfigError for a sequence that is not in the store, unless it can be computed."""
        if not needs & OF_TOKENS:
            return TeacherSignal()
        sequences = sequences_of(batch)
        entries = self.store.find(as_keys([one.key for one in sequences]))
        missing = {
            number
            for number, (one, entry) in enumerate(zip(sequences, entries, strict=True))
            if one.wanted.any() and (entry < 0 or not self.store.covered(int(entry), one.wanted))
        }
        if missing and self.miss == "error":
            raise ConfigError(self._misses(batch, sequences, missing))
        computed = self._computed(batch, sequences, missing)
        wanted, device = wanted_of(batch), batch.mask.device
        decoded = self._joined(sequences, entries, computed)
        signal = TeacherSignal()
        if Need.DISTRIBUTION in needs:
            ids, logprobs = (torch.from_numpy(one).to(device) for one in (decoded.ids, decoded.logprobs))
            signal.topk = TopK(
                ids=_placed(ids, wanted, 0),
                logprobs=_placed(logprobs, wanted, -torch.inf),
                temperature=self.temperature,
                sampled=self.store.codec.sampled,
            )
        if Need.LOGPROBS in needs:
            signal.logprobs = _placed(torch.from_numpy(decoded.target).to(device), wanted, 0.0)
        return signal

    # ---------------------------------------------------------------------------------------- what is not there

    def _misses(self, batch: Batch, sequences: Sequence[OfBatch], missing: set[int]) -> str:
        first = sequences[min(missing)]
        row = batch.row[first.number] if batch.row else f"number {first.number}"
        return (
            f"teacher.path: {len(missing)} of the {len(sequences)} rows of this batch are not in {self.store.path} "
            f"(the first is {row}, {len(first.ids)} tokens); write them with `kdcli cache "
            f"cache.path={self.store.path}` and this run's data, batch.max_length and student, or set "
            "teacher.miss=compute"
        )

    def _computed(self, batch: Batch, sequences: Sequence[OfBatch], missing: set[int]) -> dict[int, bytes]:
        """The blocks of missing sequences, by number. All ranks ask the teacher or none: it may be spread over them."""
        ask = bool(missing)
        if self._engine is not None and self._engine.world_size > 1:
            ask = any(self._engine.gather(ask))
        if not ask or self.teacher is None:
            return {}
        lines = sorted({sequences[number].line for number in missing}) or [0]
        numbers = [number for number, one in enumerate(sequences) if one.line in lines and one.wanted.any()]
        entries = capture(self.teacher, _lines(batch, lines), self.store.codec)
        return {n: one.block for n, one in zip(numbers, entries, strict=True) if n in missing}

    def _joined(self, sequences: Sequence[OfBatch], entries: np.ndarray, computed: dict[int, bytes]) -> Decoded:
        """All targets of the batch, in order."""
        blocks, kept = [], []
        for number, (one, entry) in enumerate(zip(sequences, entries, strict=True)):
            if number in computed:
                blocks.append(np.frombuffer(computed[number], np.uint8))
                kept.append(np.ones(int(one.wanted.sum()), bool))
            elif one.wanted.any():
                stored, block = self.store.block(int(entry))
                blocks.append(block)
                kept.append(one.wanted[stored])
        return self.store.codec.decode(blocks, kept)

    # ------------------------------------------------------------------------------------------ before weights load

    def _unlike_nested(self) -> list[str]:
        if self.teacher is None:
            return []
        known = self.store.identity
        dtype = str(getattr(self.teacher, "dtype", ""))
        if self.teacher.fingerprint() == known.teacher:
            return []
        what = f"of dtype {known.dtype}, not {dtype}" if dtype != known.dtype else "another teacher's"
        return [
            f"teacher.teacher: is not the teacher of {self.store.path}, which is {what}; set teacher.teacher to the "
            "one that the store was written with, or write another store"
        ]

    def _unlike_template(self, tokenizer: Any) -> list[str]:
        if tokenizer is None or template_hash(tokenizer.chat_template) == self.store.identity.template:
            return []
        return [
            f"teacher.path: {self.store.path} was written with another chat template than the student's, so its rows "
            "are other tokens; give `kdcli cache` the student of this run, with another cache.path"
        ]

    def _unlike_codec(self, where: str, objective: Objective) -> list[str]:
        """Drawn ids and likeliest ids are not taken for each other."""
        if Need.DISTRIBUTION not in objective.needs:
            return []
        draws = bool(getattr(objective, "draws", False))
        if draws == self.store.codec.sampled:
            return []
        way = "topk" if self.store.codec.sampled else "sampled"
        other = "sampled" if self.store.codec.sampled else "forward_kl"
        return [
            f"{where}: {type(objective).__name__} would be biased on {self.store.path}, which holds "
            f"{'ids drawn at random' if self.store.codec.sampled else 'the likeliest ids'}; set objective@{where}="
            f"{other}, or write another store with cache.codec={way}"
        ]

    def _damaged(self) -> list[str]:
        """Shards that have not the size that they say."""
        try:
            if not len(self.store):
                return [f"teacher.path: {self.store.path} holds nothing yet; run the same `kdcli cache` again"]
        except ConfigError as error:
            return list(error.problems)
        return []


def _placed(values: Tensor, wanted: Tensor, empty: float) -> Tensor:
    """[N, …] at the places of `wanted` [B, T], `empty` elsewhere."""
    placed = values.new_full((*wanted.shape, *values.shape[1:]), empty)
    placed[wanted] = values
    return placed


def _lines(batch: Batch, lines: Sequence[int]) -> Batch:
    """Some lines of a batch; its sequences keep their numbers."""
    index = torch.tensor(lines, device=batch.mask.device)

    def cut(record: Any, names: Iterable[str]) -> dict[str, Tensor]:
        values = {name: getattr(record, name) for name in names}
        return {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}

    view = batch.teacher
    own = None if view is None else replace(view, **cut(view, [f.name for f in fields(view)]))
    return replace(batch, **cut(batch, LINES), teacher=own)
