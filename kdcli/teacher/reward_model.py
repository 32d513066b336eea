"""A reward model's number for each whole answer: Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from kdcli.api import Batch, ModelShape, Need, Student, Task, Teacher, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.store.models import load_config, load_model, load_tokenizer, weights_hash
from kdcli.teacher._composite import Composite
from kdcli.text.vocabulary import share_ids


class RewardModelTeacher(Composite):
    """A sequence-classification model of transformers with one label, whose logit is the reward of a sequence.

    It reads the sequence's very tokens where its tokenizer gives them the student's ids and `chat` is off, else the
    text that they stand for, special tokens left out, in its own tokens. With `chat` what comes before the first
    supervised target is the user's turn and the rest the assistant's, in the reward model's chat template.

        reward = (logit - center) / scale

    `max_length` tokens are read at most: the last ones of tokens given, of text what its tokenizer keeps. `teacher`
    gives what else objectives need. Raises ConfigError for a model with several labels, or without a chat template.
    """

    def __init__(
        self,
        *,
        path: str,
        teacher: Teacher | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        chat: bool = False,
        center: float = 0.0,
        scale: float = 1.0,
        max_length: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if not scale > 0:
            raise ConfigError(f"teacher.scale: is {scale}; give a number above 0, such as the deviation of the rewards")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"teacher.max_length: is {max_length}; give at least 1, or null for all")
        self.path = path
        self.teacher = teacher
        self.dtype = dtype
        self.chat = chat
        self.center = center
        self.scale = scale
        self.max_length = max_length
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.parts = {} if teacher is None else {"teacher": teacher}
        self.provides = Need.REWARD | (Need.NOTHING if teacher is None else teacher.provides)
        self.judge: Any = None  # transformers.PreTrainedModel, from `load` on
        self.own: Any = None  # the reward model's tokenizer
        self.students: Any = None  # the tokenizer of the ids in a batch, from `follow` on

    @property
    def model(self) -> Any:
        """The teacher's, for a student that is cut from it."""
        return getattr(self.teacher, "model", None)

    def check(self) -> None:
        """Refuse, before weights load, a model that gives no single number."""
        config = load_config(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)
        if config.num_labels != 1:
            raise ConfigError(
                f"teacher.path: {self.path} has {config.num_labels} labels, but a reward model has one (num_labels in "
                "its config.json); choose a sequence-classification model with one label"
            )
        if self.chat and not self._tokenizer().chat_template:
            raise ConfigError(f"teacher.chat: {self.path} has no chat template; set teacher.chat=false")

    def load_tokenizer(self) -> Any:
        """The teacher's: ids are the student's, and the reward model reads text where it has others."""
        self.tokenizer = None if self.teacher is None else self.teacher.load_tokenizer()
        return self.tokenizer

    def load_task(self) -> Task | None:
        return None if self.teacher is None else self.teacher.load_task()

    def load(self, device: torch.device) -> None:
        super().load(device)
        self.check()
        self.judge = load_model(
            self.path,
            dtype=self.dtype,
            device=device,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            auto="AutoModelForSequenceClassification",
        ).requires_grad_(False)
        self._tokenizer()

    def follow(self, student: Student) -> None:
        super().follow(student)
        self.students = student.tokenizer

    def shape(self) -> ModelShape | None:
        return None if self.teacher is None else self.teacher.shape()

    def fingerprint(self) -> str:
        of = [weights_hash(self.path, self.revision), self.dtype, self.chat, self.center, self.scale, self.max_length]
        other = None if self.teacher is None else self.teacher.fingerprint()
        return xxhash.xxh3_128_hexdigest(repr(["reward_model", of, other]).encode())

    @torch.no_grad()
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        rest = needs & ~Need.REWARD
        signal = TeacherSignal() if self.teacher is None else self.teacher.annotate(batch, rest)
        return replace(signal, reward=self.rewards(batch)) if Need.REWARD in needs else signal

    def rewards(self, batch: Batch) -> Tensor:
        """[E] float32."""
        assert self.judge is not None and self.students is not None, "load() and follow() come before rewards"
        given = [_sequence(batch, number) for number in range(batch.num_sequences)]
        same = not self.chat and share_ids(self.own.get_vocab(), self.students.get_vocab())
        ids = [(prompt + answer)[-(self.max_length or 0) :] for prompt, answer in given] if same else self._read(given)
        # A decoder finds a row's end by its padding token; without one it takes one row at a time.
        pad = self.judge.config.get_text_config().pad_token_id
        rows = [ids] if pad is not None else [[one] for one in ids]
        with torch.autocast(batch.mask.device.type, enabled=False):
            logits = torch.cat([self._logits(some, pad or 0, batch.mask.device) for some in rows])
        return (logits - self.center) / self.scale

    def _logits(self, ids: Sequence[Sequence[int]], pad: int, device: torch.device) -> Tensor:
        """[E] float32 of some sequences, padded on the right."""
        length = max(1, *map(len, ids)) if ids else 1
        padded = torch.tensor([[*one, *[pad] * (length - len(one))] for one in ids], device=device)
        mask = torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in ids], device=device)
        return self.judge(input_ids=padded, attention_mask=mask).logits[:, 0].float()

    def _read(self, given: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
        """The reward model's own tokens of the text that (prompt, answer) stand for."""

        def text(ids: list[int]) -> str:
            return self.students.decode(ids, skip_special_tokens=True)

        if not self.chat:
            texts, special = [text(prompt + answer) for prompt, answer in given], True
        else:
            turns = [
                [{"role": "user", "content": text(prompt)}, {"role": "assistant", "content": text(answer)}]
                for prompt, answer in given
            ]
            texts, special = [self.own.apply_chat_template(turn, tokenize=False) for turn in turns], False
        cut = {"truncation": self.max_length is not None, "max_length": self.max_length}
        return self.own(texts, add_special_tokens=special, **cut)["input_ids"]

    def _tokenizer(self) -> Any:
        if self.own is None:
            self.own = load_tokenizer(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)
        return self.own


def _sequence(batch: Batch, number: int) -> tuple[list[int], list[int]]:
    """The tokens of a sequence before its first supervised target, and from there on. Ids end with the last token that
    is read; a last target that no position reads is added."""
    row, column = (batch.segment == number).nonzero(as_tuple=True)
    ids = batch.input_ids[row, column].tolist()
    learned = batch.mask[row, column].tolist()
    if learned and learned[-1]:
        ids.append(int(batch.targets[row[-1], column[-1]]))
    first = 1 + learned.index(True) if True in learned else len(ids)
    return ids[:first], ids[first:]
