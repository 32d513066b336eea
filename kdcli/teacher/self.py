"""The student as its own teacher: as it began or was some steps ago, the average of its weights (Mean Teacher,
Tarvainen & Valpola 2017, arXiv:1703.01780), or as it is now, under a richer prompt (Snell et al. 2022,
arXiv:2209.15189)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from kdcli.api import Batch, Engine, ModelShape, Need, Student, Teacher, TeacherSignal, Whole
from kdcli.errors import ConfigError
from kdcli.store.layers import Layers
from kdcli.teacher._signal import refuse_places, signal_of

LAYERS = Need.HIDDEN | Need.ATTENTION | Need.RELATIONS


class SelfTeacher(Teacher):
    """`mode` says whose weights theta' teach, after step t of the student's theta_t:

        snapshot   theta_0, or with `every` n the student's at the last step that n divides
        ema        theta'_t = decay theta'_{t-1} + (1 - decay) theta_t, theta'_0 = theta_0
        current    theta_t itself, without gradients: meant for rows with a teacher_prompt

    A copy is whole on every rank, whatever the engine does with the student, and never has dropout. `dtype` is the
    copy's; by default the student's as it was loaded. The average of a 16-bit copy is kept in float32
    beside it. What the engine keeps in 16 bits (`precision=bf16`) is averaged as it is kept.

    Only parameters that learn are copied anew and saved. Raises ConfigError for settings without effect.
    """

    is_student = True  # its shape and its tokenizer are the student's

    def __init__(
        self,
        *,
        mode: Literal["snapshot", "ema", "current"] = "snapshot",
        every: int = 0,
        decay: float = 0.999,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        if every < 0 or (every and mode != "snapshot"):
            raise ConfigError(f"teacher.every: is {every} with mode={mode}; set mode=snapshot and a number of steps")
        if not 0 <= decay < 1:
            raise ConfigError(f"teacher.decay: is {decay}; give a number of at least 0 and below 1, such as 0.999")
        if dtype is not None and mode == "current":
            raise ConfigError("teacher.dtype: mode=current has no copy, so no type of its own; leave it out")
        self.mode = mode
        self.every = every
        self.decay = decay
        self.dtype = dtype
        self.provides = Need.DISTRIBUTION | Need.LOGITS | Need.LOGPROBS | LAYERS  # of the layers, as the student
        self.needs_teacher_prompt = mode == "current"  # or its answer is the student's own
        self.changes = mode != "snapshot" or every > 0
        self.student: Student | None = None  # the copy; with `current` the student itself
        self._whole: Whole | None = None  # the engine's
        self._average: dict[str, Tensor] = {}  # float32, where the copy is of another type
        self._learned: dict[str, nn.Parameter] = {}  # of the copy, what the student learns
        self._renewed = False  # the copy is no longer the student as it began

    def place(self, engine: Engine) -> None:
        self._whole = engine.whole

    def fingerprint(self) -> NoReturn:
        raise ConfigError("teacher=self is the student, which changes as it learns; cache another teacher, such as hf")

    def shape(self) -> ModelShape | None:
        """The student's, once it is known."""
        return None if self.student is None else self.student.shape()

    def follow(self, student: Student) -> None:
        self.tokenizer = student.tokenizer
        if self.mode == "current":
            self.student = student
            return
        learning = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        own = copy.deepcopy(student).eval().requires_grad_(False)
        parameters = dict(own.named_parameters())
        self._learned = {name: parameters[name] for name in learning}
        if self.mode == "ema":
            kept = {name: p for name, p in self._learned.items() if self._kind(p).itemsize < 4}
            self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in kept.items()}
        for parameter in parameters.values():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self._kind(parameter))
        self.student = own

    @torch.no_grad()
    def after_step(self, student: Student, step: int, whole: Whole) -> None:
        """A collective where the engine shards the student: one parameter at a time is whole."""
        if self.mode == "current" or (self.mode == "snapshot" and (not self.every or step % self.every)):
            return
        learning = dict(student.named_parameters())
        for name, own in self._learned.items():
            with whole([learning[name]]):
                self._take(name, own, learning[name].detach())
        self._renewed = True

    def state_dict(self) -> dict[str, Any]:
        """What the copy has taken over from the student since it began; the average in full precision."""
        if not self._renewed:
            return {}
        return {"weights": {name: self._average.get(name, own.detach()) for name, own in self._learned.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, saved in state.get("weights", {}).items():
            self._learned[name].data.copy_(saved)
            if name in self._average:
                self._average[name].copy_(saved)
            self._renewed = True

    @torch.no_grad()
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        """One pass in evaluation mode, with the arithmetic that the student has where this is called."""
        if not needs:
            return TeacherSignal()
        student, view = self.student, batch.teacher
        assert student is not None, "follow() comes before annotate()"
        refuse_places(batch, needs)
        seen = batch
        if view is not None:
            ids, positions = view.input_ids, view.position_ids
            seen = replace(
                batch, input_ids=ids, attention_mask=view.attention_mask, position_ids=positions, teacher=None
            )
        with _evaluating(student):
            states = student.states(seen, needs & LAYERS)
        assert states.hidden is not None, "a student gives its last hidden states"
        layers = Layers(
            hidden=states.hidden,
            hidden_states=states.hidden_states,
            attentions=states.attentions,
            relations=states.relations,
        )
        with self._head_whole(needs):
            return signal_of(layers, student.head, states.embedding, batch, needs)

    def _head_whole(self, needs: Need) -> AbstractContextManager[None]:
        """The head's parameters are read here for log-probabilities only; elsewhere where the student's own are."""
        if self.mode != "current" or Need.LOGPROBS not in needs or self._whole is None or self.student is None:
            return nullcontext()
        head = self.student.head
        return self._whole([one for one in (head.weight, head.bias) if isinstance(one, nn.Parameter)])

    def _take(self, name: str, own: nn.Parameter, new: Tensor) -> None:
        """Make the copy's parameter the student's present one, or its average with what it was."""
        if self.mode == "snapshot":
            own.data.copy_(new)
            return
        average = self._average.get(name)
        total = own.data if average is None else average
        total.mul_(self.decay).add_(new.to(total.device, total.dtype), alpha=1 - self.decay)
        if average is not None:
            own.data.copy_(average)

    def _kind(self, parameter: Tensor) -> torch.dtype:
        return parameter.dtype if self.dtype is None else getattr(torch, self.dtype)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout and recomputation; afterwards each part trains or not as before."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
