"""The vocabulary of kdcli: what flows through a run, and what can be plugged into it.

Letters of shapes: B sequences, T positions, V vocabulary, K cached entries, D hidden units, E examples
(E = B unless rows are packed), N supervised targets. Token ids are int64, masks bool, losses float32 nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum, Flag, auto
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from kdcli.ops.head import Head

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # from parameter groups
ScheduleFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class Need(Flag):
    """What an objective needs of the teacher's signal, and what a teacher provides."""

    NOTHING = 0
    DISTRIBUTION = auto()  # logits, or top-k log-probabilities, per target
    LOGPROBS = auto()  # log-probability of each target
    HIDDEN = auto()  # hidden states of the layers
    ATTENTION = auto()
    REWARD = auto()
    REFERENCE = auto()  # log-probabilities of a frozen reference model


class Unit(Enum):
    """What an objective returns one number for, and so what its sum is divided by."""

    TOKEN = "token"  # [B, T], one per target
    SEQUENCE = "sequence"  # [B], one per example


# ---------------------------------------------------------------------------------------------- what flows


@dataclass(frozen=True, kw_only=True)
class Example:
    """One JSON line: what `augment` writes and `distill` reads.

    Exactly one of `text`, `messages`, `prompt` + `response`, `prompt` + `chosen` + `rejected` is given.
    """

    text: str | None = None
    messages: Sequence[Mapping[str, str]] | None = None  # [{"role": ..., "content": ...}]
    prompt: str | None = None
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    teacher_prompt: str | None = None  # what the teacher sees instead of the prompt
    domain: str = "default"
    group: str | None = None
    score: float | None = None
    weight: float = 1.0
    meta: Mapping[str, Any] = field(default_factory=dict)  # id, source, license, teacher, template, parents
    where: str = field(default="", compare=False)  # file:line it was read from, for messages; no part of the content

    @property
    def kind(self) -> str:
        """`text`, `messages`, `response` or `preference`: which of the four forms this example has."""
        if self.text is not None:
            return "text"
        if self.messages is not None:
            return "messages"
        return "preference" if self.chosen is not None else "response"


@dataclass(kw_only=True)
class Batch:
    """One micro-batch. `targets[b, t]` is the token after `input_ids[b, t]`: nothing downstream shifts."""

    input_ids: Tensor  # [B, T]
    targets: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool, True where the target is supervised
    attention_mask: Tensor  # [B, T] bool, True where there is a token and not padding
    segment: Tensor  # [B, T] which example (0..E-1) the target belongs to; -1 is padding
    weight: Tensor  # [E] float, multiplies the example's loss
    position_ids: Tensor | None = None  # [B, T], only when packed: restarts at 0 with each example
    row: list[str] = field(default_factory=list)  # [E] key of the example's content
    domain: list[str] = field(default_factory=list)  # [E]
    group: list[str | None] = field(default_factory=list)  # [E]
    score: list[float | None] = field(default_factory=list)  # [E]
    old_logprobs: Tensor | None = None  # [B, T], of the policy that wrote the targets
    on_policy: bool = False
    teacher: TeacherView | None = None  # None: the teacher sees what the student sees

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        return replace(self, **_moved(self, device))

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a transformers model. Packed rows pass positions and no attention mask:
        that is how transformers keeps examples of a row apart (an attention mask would join them)."""
        return _model_inputs(self)


@dataclass(kw_only=True)
class TeacherView:
    """The teacher's own prompt or tokenizer: its ids, and which of its positions scores which target."""

    input_ids: Tensor  # [B, T']
    attention_mask: Tensor  # [B, T']
    position: Tensor  # [B, T] index into T' of the prediction for `targets[b, t]`; -1 where none
    position_ids: Tensor | None = None

    def to(self, device: torch.device | str) -> TeacherView:
        return replace(self, **_moved(self, device))

    def model_inputs(self) -> dict[str, Any]:
        """Like `Batch.model_inputs`, of the teacher's own ids."""
        return _model_inputs(self)


@dataclass(kw_only=True)
class TopK:
    """The K likeliest next tokens per target; what is missing of the mass is the rest of the vocabulary's."""

    ids: Tensor  # [B, T, K]
    logprobs: Tensor  # [B, T, K], natural logarithm, at `temperature`
    temperature: float = 1.0


@dataclass(kw_only=True)
class TeacherSignal:
    """What a teacher says of a batch; what nobody needs is None. Never dense logits of a whole batch:
    `hidden` and `head` give them chunk by chunk, and `logits` is set only inside one chunk."""

    hidden: Tensor | None = None  # [B, T, D] before the head
    head: Head | None = None
    logits: Tensor | None = None  # [1, C, V] float32, of the chunk at hand
    topk: TopK | None = None
    logprobs: Tensor | None = None  # [B, T] of the targets
    hidden_states: tuple[Tensor, ...] | None = None  # per layer [B, T, D]
    reward: Tensor | None = None  # [E]
    reference_logprobs: Tensor | None = None  # [B, T]
    _log_softmax: dict[float, Tensor] = field(default_factory=dict, repr=False)

    def log_p(self, temperature: float = 1.0) -> Tensor | None:
        """log softmax(logits / temperature), [1, C, V], once per temperature and chunk; None for a sparse teacher."""
        return None if self.logits is None else _log_softmax(self.logits, temperature, self._log_softmax)


@dataclass(kw_only=True)
class StudentOutput:
    """What the student computed. Token objectives see one chunk of C supervised targets as B=1, T=C."""

    logits: Tensor | None = None  # [1, C, V] float32, of the chunk at hand
    logprobs: Tensor | None = None  # [B, T] of the targets, with a graph
    hidden_states: tuple[Tensor, ...] | None = None
    _log_softmax: dict[float, Tensor] = field(default_factory=dict, repr=False)

    def log_q(self, temperature: float = 1.0) -> Tensor:
        """log softmax(logits / temperature), [1, C, V]; computed once per temperature and chunk."""
        assert self.logits is not None, "logits exist only inside a chunk"
        return _log_softmax(self.logits, temperature, self._log_softmax)


@dataclass(frozen=True, kw_only=True)
class DomainLoss:
    """Held-out loss of one domain: nats per target, and nats per byte where tokenizers differ."""

    student: float
    teacher: float | None = None
    student_per_byte: float | None = None
    teacher_per_byte: float | None = None


@dataclass(kw_only=True)
class Scores:
    """Per-target scores of a model on a batch, [B, T] float32, 0 where `batch.mask` is False."""

    nll: Tensor  # nats, of the model scored
    teacher_nll: Tensor | None = None
    kl: Tensor | None = None  # KL(teacher || model)
    agree: Tensor | None = None  # 1.0 where both put the same token first


# ------------------------------------------------------------------------------------ what can be plugged in


class Stateful:
    """Something whose state is part of a checkpoint: plain JSON values or tensors, no pickles."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        del state


class Teacher(ABC):
    """The frozen model one learns from. Weights are loaded by `load`, so that a config can be checked first."""

    provides: ClassVar[Need] = Need.NOTHING
    tokenizer: Any = None  # a transformers tokenizer, from `load_tokenizer` on; None for `teacher=none`

    def load_tokenizer(self) -> Any:
        """Load and return the tokenizer alone (cheap; for checks before weights load)."""
        return None

    def load(self, device: torch.device) -> None:
        """Load weights and tokenizer. Called once on every rank, before the first `annotate`."""

    @abstractmethod
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        """The signal for the batch's targets, without gradients."""


class Student(nn.Module, ABC):
    """The model that learns: a transformers model, its tokenizer and its head."""

    model: Any  # transformers.PreTrainedModel; None until `load`, or until a StudentInit makes it
    tokenizer: Any
    head: Head
    dtype: str = "float32"  # of the parameters a StudentInit makes
    attention: str | None = None  # transformers' attn_implementation

    def load_tokenizer(self) -> Any:
        """Load and return the tokenizer alone."""
        return None

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Load weights and tokenizer; afterwards `model`, `tokenizer` and `head` are set."""

    def adopt(self, model: Any, tokenizer: Any) -> None:
        """Make `model` and `tokenizer` the student's own, with a head cut to the tokenizer's real ids."""
        self.model, self.tokenizer = model, tokenizer
        self.head = Head.of(model, 1 + max(tokenizer.get_vocab().values()))

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Hidden states before the head, [B, T, D], with a graph when gradients are on."""


class StudentInit(ABC):
    """How the student's weights begin. `student` is changed in place, or its `model` replaced."""

    @abstractmethod
    def __call__(self, student: Student, teacher: Teacher) -> None: ...


class Objective(nn.Module, ABC):
    """A loss, unreduced: one number per target, or per example. Masks, sums, counts, weights and logs are the
    Distiller's. Subclasses set `needs` and `unit` and take keyword-only settings."""

    needs: ClassVar[Need] = Need.NOTHING
    unit: ClassVar[Unit] = Unit.TOKEN

    def __init__(self, *, weight: float = 1.0, domains: Sequence[str] = ()) -> None:
        super().__init__()
        self.weight = weight
        self.domains = tuple(domains)  # train on these domains only; empty is all

    @abstractmethod
    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        """Values [B, T] (unit TOKEN) or [B] (unit SEQUENCE), in nats, with a graph to the student."""

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor] | None:
        """Values [B, T] and their gradient with respect to the student's logits [B, T, V], or None to use
        autograd. Called without a graph; must equal what autograd gives through `forward`."""
        return None


class Rollout(Stateful, ABC):
    """Whose text is learned from: the data set's, the student's or the teacher's."""

    @abstractmethod
    def __call__(self, batch: Batch, student: Student, step: int) -> Batch: ...


class DomainScheduler(Stateful, ABC):
    """Domain weights from domain losses: arithmetic on dictionaries."""

    interval: int = 0  # optimizer steps between updates; 0 is never

    def initial(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Weights before the first update, from the number of training rows per domain; they sum to 1."""
        total = sum(sizes.values())
        return {name: size / total for name, size in sizes.items()}

    @abstractmethod
    def update(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]: ...


class Data(ABC):
    """Named domains of examples."""

    max_bad_fraction: float = 0.0  # share of rows that may be dropped instead of stopping the run

    @abstractmethod
    def domains(self) -> dict[str, Iterable[Example]]:
        """Domain name -> examples, re-iterable, in a fixed order. Raises ConfigError naming file and line."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the content: equal content, equal fingerprint, wherever it lies."""

    def bad_rows(self) -> dict[str, str]:
        """Rows dropped since `domains` was called: where -> reason. Empty unless `max_bad_fraction` > 0."""
        return {}


class Transform(ABC):
    """A step of augmentation, or a filter."""

    @abstractmethod
    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]: ...


class Writer(Protocol):
    """What an augmentation step asks of a teacher that writes."""

    def write(self, prompts: Sequence[str], n: int, seed: int) -> list[list[str]]: ...


class Subject(Protocol):
    """What an evaluation may ask of the model it evaluates. With several ranks every rank calls `score`
    equally often (sharded parameters are gathered in it)."""

    tokenizer: Any
    rank: int
    world_size: int

    def score(self, batch: Batch) -> Scores: ...

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add up over ranks."""
        ...


class Evaluator(ABC):
    """Numbers about a model."""

    @abstractmethod
    def __call__(self, subject: Subject, step: int) -> dict[str, float]:
        """Metric paths without the `eval/NAME/` in front, such as `code/ppl`; equal on all ranks."""


class Reporter(ABC):
    """Where metrics go. Only rank 0 has one."""

    def start(self, info: Mapping[str, Any]) -> None:
        """Called once: {"dir": run folder, "name", "steps": total, "step": first step, "config": resolved dict}."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Engine(ABC):
    """What trains a module: one process or many, sharded or not. `world_size` ranks, this one is `rank`."""

    rank: int = 0
    world_size: int = 1
    device: torch.device

    @abstractmethod
    def start(self) -> None:
        """Join the other ranks and choose the device. Called once, before models are built."""

    @abstractmethod
    def prepare(
        self, module: nn.Module, *, optimizer: OptimizerFactory, lr_schedule: ScheduleFactory, micro_size: int
    ) -> None:
        """Take the module over: cast, shard, build the optimizer. Frozen parameters stay frozen."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward. Every rank must call it equally often."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the step's loss; `last` ends the step's accumulation.
        The shares of all ranks and micro-batches are summed, not averaged."""

    @abstractmethod
    def step(self) -> float:
        """Clip, update, advance the schedule; returns the global gradient norm before clipping."""

    @property
    @abstractmethod
    def lr(self) -> float: ...

    @abstractmethod
    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add up equal keys over ranks (float64); the same result on every rank."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """A small picklable object of every rank, on every rank, in rank order; a barrier too."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write this rank's shards of model, optimizer and schedule into `folder`."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote, also for another world size."""

    @abstractmethod
    def full_state_dict(self) -> dict[str, Tensor] | None:
        """The module's parameters by name, consolidated on rank 0's CPU; None on other ranks. A collective."""

    def close(self) -> None: ...


class Launcher(ABC):
    """Starts the worker processes of a run and waits for them."""

    processes: int = 1

    @abstractmethod
    def __call__(self, run_dir: Path, *, isolate: bool = False) -> int:
        """Run `kdcli.worker` on `run_dir`; returns the exit code. `isolate`: never inside this process."""


def _model_inputs(view: Batch | TeacherView) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": view.input_ids, "use_cache": False}
    if view.position_ids is not None:
        inputs["position_ids"] = view.position_ids
    elif not bool(view.attention_mask.all()):
        inputs["attention_mask"] = view.attention_mask.long()
    return inputs


def _moved(record: Any, device: torch.device | str) -> dict[str, Any]:
    """The fields of a dataclass that can move, moved."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    return {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor | TeacherView)}


def _log_softmax(logits: Tensor, temperature: float, known: dict[float, Tensor]) -> Tensor:
    """log softmax(logits / temperature), computed once per temperature."""
    if temperature not in known:
        scaled = logits if temperature == 1.0 else logits / temperature
        known[temperature] = torch.log_softmax(scaled, dim=-1)
    return known[temperature]
