"""The student is a model with the rows of its embedding and head made anew for another tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kdcli.api import Data, ModelShape, Student, StudentInit, Teacher
from kdcli.errors import ConfigError
from kdcli.store.models import load_tokenizer, real_ids
from kdcli.student_init._calibrate import Calibration, Measured
from kdcli.student_init._models import size, source_of, source_shape
from kdcli.student_init._vocabulary import SPECIAL, with_rows
from kdcli.text.vocabulary import Key, share_ids, token_keys

log = logging.getLogger(__name__)

LONGEST = 64  # bytes of a piece
NEAREST = 128  # tokens that a new one may be a mixture of
AT_ONCE = 1024  # new tokens whose neighbours are looked for at a time


class Transplant(StudentInit):
    """Give the model of `student.path` (or else the teacher's) the tokenizer that `student.tokenizer` names. A token
    that stands for the same bytes as one of the old tokenizer, or has the same role (such as the end), takes its row.
    Any other is a mixture of old rows:

        pieces:   the mean of the pieces of its bytes, the longest old token first
        similar:  FOCUS (arXiv:2305.14481): of the tokens that both have, weighted by sparsemax of the cosine of their
                  embeddings with the new token's in a model that knows it, which is the teacher: `student.tokenizer`
                  must be the teacher's. Departs in that model (the paper trains fastText vectors), and looks at the 128
                  nearest.

    A token without pieces takes the mean of all rows. With the teacher's tokenizer, any objective compares the two.
    `heldout` rows of `data` are measured before and after, in nats per byte, because tokens do not compare.

    Raises ConfigError if the student names no other tokenizer, and as `drop_layers` does.
    """

    def __init__(
        self,
        *,
        data: Data,
        heuristic: Literal["pieces", "similar"] = "pieces",
        heldout: int = 32,
        max_length: int = 256,
    ) -> None:
        self.heuristic = heuristic
        self.calibration = Calibration(data=data, rows=1, heldout=heldout, max_length=max_length)

    def shape(self, student: Student, teacher: Teacher) -> ModelShape | None:
        if student.model is not None:
            return student.shape()
        old, new = self._tokenizers(student, teacher)
        for tokenizer in (old, new):
            self.calibration.check(tokenizer)
        return replace(source_shape(student, teacher, "transplant"), vocab_size=real_ids(new))

    def __call__(self, student: Student, teacher: Teacher) -> None:
        source = source_of(student, teacher, "transplant")
        old, new = self._tokenizers(student, teacher)
        mixture, copied = mixtures(old, new)
        if self.heuristic == "similar":
            embedding = source_of_embedding(teacher)
            mixture = similar(mixture, copied, token_keys(new), embedding)
        model = with_rows(source, new, mixture, dtype=student.dtype, attention=student.attention).to(source.device)
        log.info(
            "student: %s of %s tokens copied (%.1f %%), the others made of %s",
            f"{len(copied):,}",
            f"{real_ids(new):,}",
            100 * len(copied) / real_ids(new),
            {"pieces": "their pieces", "similar": "similar tokens"}[self.heuristic],
        )
        one, other = (
            Measured.of(net, tokenizer, self.calibration.held_out(tokenizer, net.device))
            for net, tokenizer in ((source, old), (model, new))
        )
        log.info("student: %s, cut from %s; held-out %s -> %s", size(model), size(source), one, other)
        student.adopt(model, new)

    def _tokenizers(self, student: Student, teacher: Teacher) -> tuple[Any, Any]:
        """The old tokenizer and the new one."""
        path = getattr(student, "path", None)
        if getattr(student, "tokenizer_path", None) is None:
            raise ConfigError(
                "student_init=transplant changes to the tokenizer that student.tokenizer names, and it names none; set "
                "student.tokenizer to a model, such as teacher.path"
            )
        new, options = student.load_tokenizer(), {"revision": getattr(student, "revision", None)}
        trust = getattr(student, "trust_remote_code", False)
        old = teacher.load_tokenizer() if path is None else load_tokenizer(path, trust_remote_code=trust, **options)
        if old is None:
            raise ConfigError("student_init=transplant needs a model to cut: set teacher=hf, or student.path")
        if old.get_vocab() == new.get_vocab():
            raise ConfigError(
                "student_init=transplant: student.tokenizer is the tokenizer that the model has; name another, or set "
                "student_init=pretrained"
            )
        other = teacher.load_tokenizer() if self.heuristic == "similar" else None
        if self.heuristic == "similar" and (other is None or not share_ids(new.get_vocab(), other.get_vocab())):
            raise ConfigError(
                "student_init.heuristic=similar looks for similar tokens in the teacher's embedding, and "
                "student.tokenizer is not the teacher's; set it to teacher.path, or student_init.heuristic=pieces"
            )
        return old, new


@dataclass
class Mixture:
    """Each new row as a weighted sum of old ones."""

    ids: list[list[int]]
    weights: list[list[float]]

    def __call__(self, rows: Tensor) -> Tensor:
        """[V, D] -> [V', D]"""
        flat = torch.tensor([index for some in self.ids for index in some], device=rows.device)
        lengths = torch.tensor([len(some) for some in self.ids], device=rows.device)
        weights = torch.tensor([weight for some in self.weights for weight in some], device=rows.device)
        summed = torch.nn.functional.embedding_bag(
            flat, rows.float(), lengths.cumsum(0) - lengths, mode="sum", per_sample_weights=weights
        )
        none = lengths == 0
        summed[none] = rows.float().mean(dim=0)
        return summed.to(rows.dtype)


def mixtures(old: Any, new: Any) -> tuple[Mixture, dict[int, int]]:
    """Each new token as the mean of old ones, and which are copies: new id -> old id."""
    known: dict[Key, int] = {}
    for index, key in enumerate(token_keys(old)):
        known.setdefault(key, index)
    roles = {
        getattr(new, f"{role}_token_id", None): getattr(old, f"{role}_token_id", None) for role in reversed(SPECIAL)
    }
    copied: dict[int, int] = {}
    ids: list[list[int]] = []
    for index, key in enumerate(token_keys(new)):
        match = known.get(key) if key is not None else None
        match = roles.get(index) if match is None else match
        if match is not None:
            copied[index] = match
        ids.append([match] if match is not None else pieces(key, known) if isinstance(key, bytes) else [])
    return Mixture(ids, [[1 / len(some) for _ in some] for some in ids]), copied


def pieces(text: bytes, known: dict[Key, int]) -> list[int]:
    """Old tokens that make up the text, the longest first; a byte that none begins with is left out."""
    found, place = [], 0
    while place < len(text):
        ends = range(min(len(text), place + LONGEST), place, -1)
        end = next((end for end in ends if text[place:end] in known), None)
        if end is not None:
            found.append(known[text[place:end]])
        place = place + 1 if end is None else end
    return found


def similar(mixture: Mixture, copied: dict[int, int], keys: Sequence[Key], embedding: Tensor) -> Mixture:
    """The mixture with ordinary tokens that are no copies made of those that are, which the `embedding` [V', D] of
    another model says are close."""
    both = [index for index in copied if isinstance(keys[index], bytes)]
    others = [i for i, key in enumerate(keys) if i not in copied and isinstance(key, bytes) and i < len(embedding)]
    if not both or not others:
        return mixture
    unit = torch.nn.functional.normalize(embedding.detach().float(), dim=-1)
    ids, weights = list(mixture.ids), list(mixture.weights)
    anchors = unit[both]
    for start in range(0, len(others), AT_ONCE):
        some = others[start : start + AT_ONCE]
        near = (unit[some] @ anchors.T).topk(min(NEAREST, len(both)), dim=-1)
        shares = sparsemax(near.values)
        for index, share, place in zip(some, shares.tolist(), near.indices.tolist(), strict=True):
            chosen = [(copied[both[p]], weight) for p, weight in zip(place, share, strict=True) if weight > 0]
            ids[index], weights[index] = [old for old, _ in chosen], [weight for _, weight in chosen]
    return Mixture(ids, weights)


def sparsemax(scores: Tensor) -> Tensor:
    """The nearest distribution to each row of scores [N, K], which descend: Martins & Astudillo, arXiv:1602.02068."""
    number = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    sums = scores.cumsum(dim=-1)
    support = (1 + number * scores > sums).sum(dim=-1, keepdim=True)
    threshold = (sums.gather(-1, support - 1) - 1) / support
    return (scores - threshold).clamp(min=0)


def source_of_embedding(teacher: Teacher) -> Tensor:
    """The teacher's input embedding, whole. Raises ConfigError where it has none here."""
    model = getattr(teacher, "model", None)
    weight = None if model is None else model.get_input_embeddings().weight
    if weight is None or weight.is_meta or hasattr(weight, "ds_id") or not weight.is_floating_point():
        raise ConfigError(
            f"student_init.heuristic=similar reads the teacher's embedding, and {type(teacher).__name__} has none that "
            "is whole in memory; set teacher=hf, or student_init.heuristic=pieces"
        )
    return weight
