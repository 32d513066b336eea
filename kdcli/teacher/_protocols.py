"""How servers are asked for the log-probabilities of given tokens, and how their answers are read.

| protocol | request | log-probabilities, per token of the prompt |
| --- | --- | --- |
| vllm | `/completions`: `prompt` (ids), `prompt_logprobs` = k | `choices[0].prompt_logprobs`: null, then {id: {logprob, rank, decoded_token}}, the k likeliest and the token itself |
| sglang | `/generate` at the root: `input_ids`, `return_logprob`, `logprob_start_len`, `top_logprobs_num` = k | `meta_info.input_token_logprobs`: [logprob, id, text]; `meta_info.input_top_logprobs`: lists of those |
| openai | `/completions`: `prompt` (ids), `echo`, `logprobs` = k | `choices[0].logprobs`: tokens, token_logprobs, and top_logprobs: {text or `token_id:N`: logprob} |

Documented by vLLM (vllm.logprobs; prompt_logprobs of its completions), SGLang (docs.sglang.io, native API) and OpenAI (legacy
completions). In all of them the first token has none, since nothing predicts it.
"""  # noqa: E501

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.store.http import BadAnswerError, Question

NONE = -9999.0  # how vLLM writes -inf, which JSON cannot
ROUNDING = 1e-3  # what probabilities may sum to beyond 1
PADDING = 0.01  # mass on ids that the tokenizer lacks: a model's padded rows have next to none
PER_ENTRY = 512  # bytes of one entry in an answer: an id, a number and a token's text, escaped
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # how a part of a character is decoded
PREFIX = "token_id:"


@dataclass(frozen=True)
class Scored:
    """What a server says of N targets."""

    ids: Tensor  # [N, K]
    logprobs: Tensor  # [N, K], falling; -inf where there is no entry
    targets: Tensor  # [N] log-probability of each target itself


@dataclass(frozen=True)
class Entry:
    """One target in a server's answer."""

    top: Sequence[tuple[float, int]]  # (log-probability, id)
    target: float
    given: int  # entries in the answer, those without an id of their own included


class AbsentError(BadAnswerError):
    """The answer has no log-probabilities of the prompt."""


class Vocabulary:
    """The served model's ids: how many are real, and what each is written as."""

    def __init__(self, tokenizer: Any) -> None:
        self.known = sorted(set(tokenizer.get_vocab().values()))
        self.size = 1 + self.known[-1]
        self.texts: list[str] = tokenizer.batch_decode([[i] for i in range(self.size)])
        seen = Counter(self.texts)
        self.by_text = {text: i for i, text in enumerate(self.texts) if seen[text] == 1 and UNKNOWN not in text}
        self.special = set(tokenizer.all_special_ids)

    def differs(self, index: int, text: str) -> bool:
        """Whether `text` is certainly not what `index` stands for. Parts of characters, and the space that a word may
        begin with, are written in several ways."""
        if not 0 <= index < self.size:
            return True
        own = self.texts[index]
        return UNKNOWN not in own + text and own.strip() != text.strip() and bool(own.strip() and text.strip())


class Protocol(ABC):
    """One way to ask for the log-probabilities of ids[first:], each after all that is before it."""

    name: str
    exact_count = True  # every target has as many entries as were asked for

    def __init__(self, model: str) -> None:
        self.model = model

    @abstractmethod
    def question(self, ids: Sequence[int], first: int, k: int, *, texts: bool = False) -> Question:
        """For k entries per target; 0 asks for the targets' own alone. `texts`: with tokens written out."""

    @abstractmethod
    def entries(self, answer: Any, ids: Sequence[int], first: int, vocabulary: Vocabulary) -> list[Entry]:
        """One per target. Raises ConfigError if the answer is about other ids, AbsentError if it is about none; what
        else an unexpected answer raises is told as BadAnswerError."""

    def texts(self, answer: Any) -> Mapping[int, str]:
        """What the server's own tokenizer writes for ids, as far as the answer says."""
        del answer
        return {}

    def limit(self, ids: Sequence[int], k: int) -> int:
        """Bytes that an answer may have."""
        return (1 << 20) + PER_ENTRY * len(ids) * (k + 2)


class VLLM(Protocol):
    name = "vllm"

    def question(self, ids: Sequence[int], first: int, k: int, *, texts: bool = False) -> Question:
        del first, texts  # it answers for the whole prompt, and always writes tokens out
        body = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 1, "prompt_logprobs": k}
        return Question("completions", body, self.limit(ids, k))

    def entries(self, answer: Any, ids: Sequence[int], first: int, vocabulary: Vocabulary) -> list[Entry]:
        del vocabulary
        places = self._places(answer)
        _same_number(len(places), len(ids))
        found = []
        for index, place in zip(ids[first:], places[first:], strict=True):
            if str(index) not in place:
                raise _other_ids()
            top = [(float(value["logprob"]), int(key)) for key, value in place.items()]
            found.append(Entry(top, float(place[str(index)]["logprob"]), len(top)))
        return found

    def texts(self, answer: Any) -> Mapping[int, str]:
        items = [item for place in self._places(answer) if place for item in place.items()]
        return {int(key): value["decoded_token"] for key, value in items if value.get("decoded_token") is not None}

    @staticmethod
    def _places(answer: Any) -> list[Any]:
        choice = answer["choices"][0]
        if choice.get("prompt_logprobs") is None:
            raise AbsentError("the answer has no prompt_logprobs")
        return choice["prompt_logprobs"]


class SGLang(Protocol):
    name = "sglang"

    def question(self, ids: Sequence[int], first: int, k: int, *, texts: bool = False) -> Question:
        body = {
            "input_ids": list(ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": first - 1,  # the first entry it gives is always empty
            "top_logprobs_num": k,
            "return_text_in_logprobs": texts,
        }
        return Question("//generate", body, self.limit(ids, k))

    def entries(self, answer: Any, ids: Sequence[int], first: int, vocabulary: Vocabulary) -> list[Entry]:
        del vocabulary
        meta = self._meta(answer)
        number = len(ids) - first
        own = meta["input_token_logprobs"]
        top = meta.get("input_top_logprobs") or [None] * len(own)
        if len(own) < number or len(top) != len(own):
            _same_number(min(len(own), len(top)), number)
        found = []
        for index, one, places in zip(ids[first:], own[-number:], top[-number:], strict=True):
            if int(one[1]) != index:
                raise _other_ids()
            pairs = [(float(place[0]), int(place[1])) for place in places or ()]
            found.append(Entry(pairs, float(one[0]), len(pairs)))
        return found

    def texts(self, answer: Any) -> Mapping[int, str]:
        return {int(one[1]): one[2] for one in self._meta(answer)["input_token_logprobs"] if one[2] is not None}

    @staticmethod
    def _meta(answer: Any) -> Any:
        meta = answer["meta_info"]
        if not meta.get("input_token_logprobs"):
            raise AbsentError("the answer has no meta_info.input_token_logprobs")
        return meta


class OpenAI(Protocol):
    """Tokens as `token_id:N` where the server can (vLLM's `return_tokens_as_token_ids`), else as texts: then several
    ids may be written alike, and an entry that could be any of them is left to the rest of the mass."""

    name = "openai"

    def __init__(self, model: str, *, as_ids: bool) -> None:
        super().__init__(model)
        self.as_ids = as_ids
        self.exact_count = as_ids

    def question(self, ids: Sequence[int], first: int, k: int, *, texts: bool = False) -> Question:
        del first, texts
        body = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 1, "echo": True}
        body |= {"logprobs": max(1, k)} | ({"return_tokens_as_token_ids": True} if self.as_ids else {})
        return Question("completions", body, self.limit(ids, max(1, k)))

    def entries(self, answer: Any, ids: Sequence[int], first: int, vocabulary: Vocabulary) -> list[Entry]:
        told = answer["choices"][0].get("logprobs")
        if not told or not told.get("token_logprobs"):
            raise AbsentError("the answer has no logprobs")
        tokens, own, top = told["tokens"], told["token_logprobs"], told["top_logprobs"]
        if len(tokens) < len(ids):  # what is generated comes after the prompt
            raise AbsentError("the answer has no logprobs of the prompt")
        if self.as_ids and not tokens[0].startswith(PREFIX):
            raise AbsentError("the answer writes tokens out, and not as token_id:N")
        found = []
        for place in range(first, len(ids)):
            if self._is_other(tokens[place], ids[place], vocabulary):
                raise _other_ids()
            named = ((value, self._id(token, vocabulary)) for token, value in top[place].items())
            pairs = [(float(value), index) for value, index in named if index is not None]
            found.append(Entry(pairs, float(own[place]), len(top[place])))
        return found

    def _id(self, token: str, vocabulary: Vocabulary) -> int | None:
        return int(token.removeprefix(PREFIX)) if self.as_ids else vocabulary.by_text.get(token)

    def _is_other(self, token: str, index: int, vocabulary: Vocabulary) -> bool:
        return int(token.removeprefix(PREFIX)) != index if self.as_ids else vocabulary.differs(index, token)


def candidates(protocol: str, model: str) -> list[Protocol]:
    """The protocols to try in turn, the most exact first."""
    known: dict[str, list[Protocol]] = {
        "vllm": [VLLM(model)],
        "sglang": [SGLang(model)],
        "openai": [OpenAI(model, as_ids=True), OpenAI(model, as_ids=False)],
    }
    return [one for several in known.values() for one in several] if protocol == "auto" else known[protocol]


def scored(protocol: Protocol, answer: Any, ids: Sequence[int], first: int, k: int, vocabulary: Vocabulary) -> Scored:
    """The log-probabilities of ids[first:] that `answer` holds, each with its k likeliest.

    Raises BadAnswerError for what another try may answer better, ConfigError for another tokenizer and for fewer
    entries than were asked for.
    """
    with readable():
        entries = protocol.entries(answer, ids, first, vocabulary)
    assert len(entries) == len(ids) - first, f"{len(entries)} entries of {len(ids) - first} targets"
    wanted = min(k, vocabulary.size)
    given = [entry.given for entry in entries]
    fewest = min(given) if protocol.exact_count else max(given)
    if k and fewest < wanted:
        raise ConfigError(
            f"teacher.k: {wanted} log-probabilities per target were asked for, and the server gives {fewest}; start it "
            f"with a higher limit (vLLM: --max-logprobs {wanted}), or set teacher.k={max(1, fewest)}"
        )
    rows = [_sorted(entry.top, wanted, vocabulary) for entry in entries]
    targets = torch.tensor([_checked(entry.target) for entry in entries])
    found_ids, found = torch.zeros(len(rows), wanted, dtype=torch.int64), torch.full((len(rows), wanted), -math.inf)
    for place, row in enumerate(rows):
        found[place, : len(row)] = torch.tensor([value for value, _ in row])
        found_ids[place, : len(row)] = torch.tensor([index for _, index in row], dtype=torch.int64)
    return Scored(found_ids, found, targets)


@contextmanager
def readable() -> Any:
    """Tell whatever an answer of an unexpected form raises as BadAnswerError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise BadAnswerError(
            f"an answer without the fields of this protocol ({type(error).__name__}: {error})"
        ) from error


def _sorted(top: Iterable[tuple[float, int]], k: int, vocabulary: Vocabulary) -> list[tuple[float, int]]:
    """The k likeliest of the tokenizer's ids, falling."""
    pairs = [(_checked(value), index) for value, index in top if value > NONE]
    if len({index for _, index in pairs}) < len(pairs) or any(index < 0 for _, index in pairs):
        raise BadAnswerError("an answer that names an id twice, or one below 0")
    mass = math.fsum(math.exp(value) for value, _ in pairs)
    if mass > 1 + ROUNDING:
        raise BadAnswerError(f"an answer whose probabilities sum to {mass:.4f}")
    real = [(value, index) for value, index in pairs if index < vocabulary.size]
    if mass - math.fsum(math.exp(value) for value, _ in real) > PADDING:
        raise _other_ids()
    return sorted(real, key=lambda pair: (-pair[0], pair[1]))[:k]


def _checked(value: float) -> float:
    if not math.isfinite(value) or value > ROUNDING:
        raise BadAnswerError(f"an answer with {value} for a log-probability")
    return min(value, 0.0)


def _same_number(given: int, wanted: int) -> None:
    if given != wanted:
        raise BadAnswerError(f"an answer about {given} tokens in place of {wanted}")


def _other_ids() -> ConfigError:
    return ConfigError(
        "teacher.tokenizer: the server's answer is about other tokens than were sent, so the served model has another "
        "tokenizer; set teacher.tokenizer to the served model's own folder or hub id, and check teacher.model"
    )
