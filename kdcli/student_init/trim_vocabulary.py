"""The student is the teacher with only the tokens that your data use."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from kdcli.api import Data, ModelShape, Student, StudentInit, Teacher
from kdcli.errors import ConfigError
from kdcli.store.models import real_ids
from kdcli.store.tokens import Row
from kdcli.student_init._calibrate import Measured, batches, first_rows
from kdcli.student_init._models import size, source_of, source_shape, tokenizer_of
from kdcli.student_init._vocabulary import BytePairs, with_rows
from kdcli.text.tokenize import encode, tokenizer_fingerprint

log = logging.getLogger(__name__)


class TrimVocabulary(StudentInit):
    """Keep the tokens that `data` use at least `min_count` times, or of those the most frequent until there are `size`;
    special tokens, letters and bytes, so that any text can still be written; and all parts of a kept token, so that it
    is still made. Text of kept tokens has the same tokens and, but for what others had of the probability, the same
    predictions. Text of others takes more tokens.

    All of `data` counts but `heldout` examples, which are measured on before and after: in nats per byte, because
    tokens do not compare. The student's tokenizer is then another than the teacher's, so distilling from it needs
    objectives for different tokenizers.

    Raises ConfigError if the tokenizer is no byte-pair one, if `size` is too small for what must stay, if no token
    goes, and where the data have too few rows.
    """

    def __init__(
        self, *, data: Data, min_count: int = 1, size: int | None = None, heldout: int = 32, max_length: int = 256
    ) -> None:
        for name, value, least in (("min_count", min_count, 1), ("heldout", heldout, 1), ("max_length", max_length, 2)):
            if value < least:
                raise ConfigError(f"student_init.{name} is {value}; give at least {least}")
        self.data, self.min_count, self.size = data, min_count, size
        self.heldout, self.max_length = heldout, max_length
        self._made: tuple[str, Any, list[int]] | None = None  # of which tokenizer, the new one, its ids in the old

    def load_tokenizer(self, student: Student, teacher: Teacher) -> Any:
        return self._trimmed(tokenizer_of(student, teacher))[0]

    def shape(self, student: Student, teacher: Teacher) -> ModelShape | None:
        if student.model is not None:
            return student.shape()
        whole = source_shape(student, teacher, "trim_vocabulary")
        return replace(whole, vocab_size=real_ids(self.load_tokenizer(student, teacher)))

    def __call__(self, student: Student, teacher: Teacher) -> None:
        source, old = source_of(student, teacher, "trim_vocabulary"), tokenizer_of(student, teacher)
        new, ids = self._trimmed(old)
        model = with_rows(source, new, lambda rows: rows[ids], dtype=student.dtype, attention=student.attention).to(
            source.device
        )
        log.info("student: keeps %s of %s tokens", f"{len(ids):,}", f"{real_ids(old):,}")
        one, other = (self._measured(*pair) for pair in ((source, old), (model, new)))
        log.info("student: %s, cut from %s; held-out %s -> %s", size(model), size(source), one, other)
        student.adopt(model, new)

    def _measured(self, model: Any, tokenizer: Any) -> Measured:
        return Measured.of(model, tokenizer, batches(self._held_out(tokenizer), tokenizer, model.device))

    def _held_out(self, tokenizer: Any) -> list[Row]:
        return first_rows(self.data, tokenizer, self.heldout, self.max_length)

    def _trimmed(self, tokenizer: Any) -> tuple[Any, list[int]]:
        key = tokenizer_fingerprint(tokenizer)
        if self._made is None or self._made[0] != key:
            ids = self._ids(tokenizer)
            self._made = key, BytePairs(tokenizer).trimmed(ids), ids
        return self._made[1:]

    def _ids(self, tokenizer: Any) -> list[int]:
        """The ids to keep, ascending."""
        pairs, counts = BytePairs(tokenizer), self._counts(tokenizer)
        kept = pairs.always()
        if self.size is not None and self.size < len(kept):
            raise ConfigError(
                f"student_init.size is {self.size}, but letters and special tokens alone are {len(kept)}; give more"
            )
        frequent = np.argsort(-counts, kind="stable")
        for index in frequent[counts[frequent] >= self.min_count].tolist():
            more = pairs.with_parts(index) - kept
            if self.size is None or len(kept) + len(more) <= self.size:
                kept |= more
        if len(kept) == len(tokenizer.get_vocab()):
            raise ConfigError(
                "student_init=trim_vocabulary: the data use every token, so none can go; raise student_init.min_count, "
                "or give student_init.size"
            )
        return sorted(kept)

    def _counts(self, tokenizer: Any) -> np.ndarray:
        """How often each id occurs, outside of what is measured on."""
        measured = {_document(row) for row in self._held_out(tokenizer)}
        domains, _ = encode(self.data, tokenizer, max_length=self.max_length, overflow="split")
        left = (row.segments[0].ids for rows in domains.values() for row in rows if _document(row) not in measured)
        counts = np.zeros(real_ids(tokenizer), np.int64)
        while some := list(islice(left, 1024)):
            counts += np.bincount(np.concatenate(some), minlength=len(counts))
        if not counts.any():
            raise ConfigError(
                f"student_init.data: student_init.heldout = {self.heldout} examples are measured on, and none is left "
                "to count; lower it, or add rows"
            )
        return counts


def _document(row: Row) -> str:
    return row.segments[0].key.partition("#")[0]
