"""Text from a transformers model, a batch of rows at a time, where each row's text is its own affair."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Matcher = Any  # llguidance.LLMatcher


@dataclass
class Row:
    """One text to write, and what of it there is."""

    prompt: Sequence[int]  # ids
    most: int  # tokens
    temperature: float = 1.0
    top_p: float = 1.0
    seed: tuple[int, int] = (0, 0)  # of the request, and which sample of it
    stop: Sequence[str] = ()
    matcher: Matcher | None = None  # holds the text to a form
    ids: list[int] = field(default_factory=list)
    said: bool = False  # more than white space
    finished: str = ""  # stop or length, once it is

    def draws(self) -> np.ndarray:
        """[most] in [0, 1): one per position, from a counter-based generator, so that they are the row's alone."""
        return np.random.Generator(np.random.Philox(key=self.seed)).random(self.most)


class Generator:
    """Left-padded batches with a cache of keys and values; rows that are finished leave it.

    A token is drawn by inverting the cumulative distribution softmax(logits / temperature), cut to `top_p`, at the
    row's own draw for that position. What others are in the batch moves its logits by rounding errors alone, and so
    its tokens almost never. No text ends before it says something.
    """

    def __init__(self, model: Any, tokenizer: Any, *, vocabulary: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary  # ids that are tokens; the model's logits may be padded beyond
        self.ends = _ends(model, tokenizer)
        accepted = inspect.signature(model.forward).parameters
        self._takes = {name for name in ("position_ids", "logits_to_keep") if name in accepted}

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> None:
        """Write the rows. `ids` are then without the token that ended them."""
        device = self.model.device
        width = max(len(row.prompt) for row in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id or 0, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, width - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[place, width - len(row.prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        active, draws, cache = list(rows), [row.draws() for row in rows], None
        for position in range(max(row.most for row in rows)):
            logits, cache = self._forward(ids, mask, places, cache)
            chosen = self._choose(logits, active, np.array([one[position] for one in draws]))
            self._take(active, chosen)
            left = [place for place, row in enumerate(active) if not row.finished]
            if not left:
                return
            ids = torch.tensor(chosen, device=device)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], 1)
            places = places[:, -1:] + 1
            if 4 * len(left) <= 3 * len(active) and hasattr(cache, "batch_select_indices"):
                kept = torch.tensor(left, device=device)
                cache.batch_select_indices(kept)
                ids, mask, places = ids[kept], mask[kept], places[kept]
                active, draws = [active[place] for place in left], [draws[place] for place in left]
            else:  # those that are finished stay as ballast, and need draws
                draws = [one if len(one) > position + 1 else np.zeros(position + 2) for one in draws]

    def _forward(self, ids: Tensor, mask: Tensor, places: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """[A, V] float32 logits of the next token."""
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if "position_ids" in self._takes:
            inputs["position_ids"] = places
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        said = self.model(**inputs)
        return said.logits[:, -1].float(), said.past_key_values

    def _choose(self, logits: Tensor, rows: Sequence[Row], draws: np.ndarray) -> list[int]:
        """An id per row."""
        logits[:, self.vocabulary :] = -torch.inf
        allowed = self._allowed(rows, logits.shape[1])
        if allowed is not None:
            logits = logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)
        temperatures = torch.tensor([row.temperature for row in rows], device=logits.device)[:, None]
        cool = temperatures < 1e-4
        if bool(cool.all()):
            return logits.argmax(-1).tolist()
        probabilities = torch.softmax(logits / temperatures.masked_fill(cool, 1.0), -1)
        if any(row.top_p < 1 for row in rows):
            probabilities = _nucleus(probabilities, torch.tensor([row.top_p for row in rows], device=logits.device))
        reached = probabilities.cumsum(-1, dtype=torch.float64)
        level = torch.from_numpy(draws).to(reached)[:, None] * reached[:, -1:]
        drawn = torch.searchsorted(reached, level, right=True).clamp(max=self.vocabulary - 1)
        return torch.where(cool, logits.argmax(-1, keepdim=True), drawn)[:, 0].tolist()

    def _allowed(self, rows: Sequence[Row], width: int) -> np.ndarray | None:
        """[A, V] bool: the ids by which forms can be kept to, and by which a text does not end before it begins."""
        if all(row.matcher is None and (row.said or row.finished) for row in rows):
            return None
        words = np.full((len(rows), (width + 31) // 32), -1, dtype=np.int32)
        for place, row in enumerate(rows):
            if row.matcher is not None and not row.finished:
                row.matcher.unsafe_compute_mask_ptr(words[place].ctypes.data, words.shape[1] * 4)
        allowed = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :width].astype(bool)
        for place, row in enumerate(rows):
            if row.matcher is None and not row.said:
                allowed[place, list(self.ends)] = False
        return allowed

    def _take(self, rows: Sequence[Row], chosen: Sequence[int]) -> None:
        for row, token in zip(rows, chosen, strict=True):
            if row.finished:
                continue
            if token in self.ends:
                row.finished = "stop"
                continue
            row.ids.append(token)
            row.said = row.said or bool(self.tokenizer.decode(row.ids).strip())
            if row.matcher is not None:
                row.matcher.consume_token(token)
            if row.matcher is not None and row.matcher.is_stopped():
                row.finished = "length" if row.matcher.is_error() else "stop"
            elif row.stop and any(stop in self._tail(row) for stop in row.stop):
                row.finished = "stop"
            elif len(row.ids) >= row.most:
                row.finished = "stop" if row.matcher is not None and row.matcher.is_accepting() else "length"

    def _tail(self, row: Row) -> str:
        """The end of a text, long enough for every stop string that its last token may complete."""
        return self.tokenizer.decode(row.ids[-(8 + max(map(len, row.stop))) :], skip_special_tokens=True)


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """[A, V] with 0 outside the fewest likeliest tokens whose sum reaches top_p [A]."""
    values, order = probabilities.sort(-1, descending=True)
    before = values.cumsum(-1) - values
    values = values.masked_fill(before >= top_p[:, None], 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, values)


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = known if isinstance(known, list | tuple) else [known]
    return frozenset(one for one in [*ends, tokenizer.eos_token_id] if one is not None)
