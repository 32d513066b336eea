"""The vocabulary of kdcli: what flows through a run, and what can be plugged into it.

Letters of shapes: B rows, T positions, V vocabulary, K cached entries, D hidden units, E sequences (E = B unless
rows are packed), G groups of sequences, H attention heads, N supervised targets; T', V', H' of another model or kind.
Token ids are int64, masks bool, losses float32 nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from enum import Enum, Flag, auto
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from kdcli.ops.head import Head

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # from parameter groups
Whole = Callable[[Iterable[nn.Parameter]], AbstractContextManager[None]]  # Engine.whole
ScheduleFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
T = TypeVar("T")


class Need(Flag):
    """What an objective needs of the teacher's signal, and what a teacher provides."""

    NOTHING = 0
    DISTRIBUTION = auto()  # logits, or top-k log-probabilities, per target
    LOGITS = auto()  # logits of the whole vocabulary per target
    LOGPROBS = auto()  # log-probability of each target
    HIDDEN = auto()  # hidden states of the layers
    ATTENTION = auto()  # attention probabilities of the layers
    RELATIONS = auto()  # queries, keys and values of the layers
    REWARD = auto()  # a number per sequence
    REFERENCE = auto()  # log-probabilities of a frozen reference: a teacher's, or else the student's as it began


class Unit(Enum):
    """What an objective returns one number for, and so what its sum is divided by."""

    TOKEN = "token"  # [B, T], one per target
    SEQUENCE = "sequence"  # [E], one per sequence
    GROUP = "group"  # [G], one per group of sequences: a preference pair, or the scored answers to one prompt


class Scope(Enum):
    """What of the student an objective sees, and so what it costs in memory."""

    CHUNK = "chunk"  # logits of some targets at a time, [1, C, V]
    LOGPROBS = "logprobs"  # of the whole micro-batch the log-probabilities of the targets, [B, T]
    STATES = "states"  # of the whole micro-batch what the layers computed, and the head


Reduction = Literal[
    "token", "sequence", "batch"
]  # mean over targets | over sequences of means | over sequences of sums


TaskKind = Literal["causal", "classification", "seq2seq", "encoding"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model makes of a row: `causal` goes on with the text, `classification` names the prompt's label,
    `seq2seq` writes the response to the prompt, `encoding` gives each token of the prompt a state."""

    kind: TaskKind = "causal"
    labels: tuple[str, ...] = ()  # of a classification, in the order of the model's classes


class Settings(TypedDict, total=False):
    """Settings of every objective; constructors hand them on as `**settings: Unpack[Settings]`."""

    weight: float
    domains: Sequence[str]


class TokenSettings(Settings, total=False):
    """Settings of every objective of unit TOKEN."""

    reduction: Reduction


# ---------------------------------------------------------------------------------------------- what flows


@dataclass(frozen=True, kw_only=True)
class Example:
    """One JSON line: what `augment` writes and `distill` reads.

    Exactly one of `text`, `messages`, `prompt` + `response`, `prompt` + `chosen` + `rejected` is given; inside an
    augmentation a prompt may still be without its response.
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
    meta: Mapping[str, Any] = field(default_factory=dict)  # id, source, license, parents, written, other columns
    where: str = field(default="", compare=False)  # file:line it was read from, for messages; no part of the content

    @property
    def kind(self) -> str:
        """`text`, `messages`, `preference`, `response`, or `prompt` while it has none: which form this example has."""
        if self.text is not None:
            return "text"
        if self.messages is not None:
            return "messages"
        if self.chosen is not None:
            return "preference"
        return "response" if self.response is not None else "prompt"


@dataclass(kw_only=True)
class Batch:
    """One micro-batch. `targets[b, t]` is the token after `input_ids[b, t]`: nothing downstream shifts."""

    input_ids: Tensor  # [B, T]
    targets: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool, True where the target is supervised
    attention_mask: Tensor  # [B, T] bool, True where there is a token and not padding
    segment: Tensor  # [B, T] which sequence (0..E-1) the target belongs to; -1 is padding
    weight: Tensor  # [E] float, multiplies the sequence's loss
    position_ids: Tensor | None = None  # [B, T], only when packed: restarts at 0 with each example
    row: list[str] = field(default_factory=list)  # [E] key of the example's content
    domain: list[str] = field(default_factory=list)  # [E]
    group: list[str | None] = field(default_factory=list)  # [E]
    score: list[float | None] = field(default_factory=list)  # [E]
    rejected: Tensor | None = None  # [E] bool, True where a preference pair has its worse answer; None: there are none
    group_index: Tensor | None = None  # [E] int64, which group (0..G-1) a sequence is of; None: each is its own
    old_logprobs: Tensor | None = None  # [B, T], of the policy that wrote the targets
    on_policy: bool = False
    teacher: TeacherView | None = None  # None: the teacher sees what the student sees

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        return replace(self, **_moved(self, device))

    @property
    def num_sequences(self) -> int:
        """E."""
        return len(self.weight)

    def groups(self) -> Tensor:
        """[E] int64: which group (0..G-1) each sequence is of. Both answers of a preference pair are one group (the
        better one first), and so are all answers of equal `group` in a row of the data; any other is its own."""
        if self.group_index is not None:
            return self.group_index
        return torch.arange(self.num_sequences, device=self.weight.device)

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """[B, T] -> [E]: the sum over each sequence's supervised targets, differentiable."""
        kept = values[self.mask]
        return kept.new_zeros(self.num_sequences).index_add(0, self.segment[self.mask], kept)

    def targets_by_sequence(self) -> Tensor:
        """[E] float: how many supervised targets each sequence has."""
        return self.sum_by_sequence(torch.ones_like(self.mask, dtype=torch.float32))

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a transformers model. Packed rows pass positions and no attention mask:
        that is how transformers keeps examples of a row apart (an attention mask would join them)."""
        return _model_inputs(self)


@dataclass(kw_only=True)
class TeacherView:
    """The teacher's own prompt or tokenizer: its ids, and which of its positions scores which target.

    With another tokenizer, a span is the shortest stretch of the answer's bytes that both tokenizers cut alike: one or
    more of the student's targets beside one or more of the teacher's. `position` then says where the teacher predicts
    what begins at the same byte, so it is set at the first target of each span.
    """

    input_ids: Tensor  # [B, T']
    attention_mask: Tensor  # [B, T']
    position: Tensor  # [B, T] index into T' of the prediction for `targets[b, t]`; -1 where none
    position_ids: Tensor | None = None
    # with another tokenizer only
    targets: Tensor | None = None  # [B, T'] already shifted
    mask: Tensor | None = None  # [B, T'] bool, True where the teacher's target is of the answer
    span: Tensor | None = None  # [B, T] the span (0..S-1, counted through the batch) of the student's target; -1 none
    teacher_span: Tensor | None = None  # [B, T'] the span of the teacher's target; -1 none

    @property
    def foreign(self) -> bool:
        """Whether the teacher has another tokenizer."""
        return self.targets is not None

    def exact(self) -> Tensor:
        """[B, T] bool: where a span is one target of the student and one of the teacher, so that both stand for the
        same bytes after the same bytes."""
        assert self.span is not None, "spans exist with another tokenizer only"
        assert self.teacher_span is not None, "spans exist with another tokenizer only"
        size = 1 + max(0, int(self.span.max()), int(self.teacher_span.max()))
        of_student, of_teacher = (
            torch.bincount(span[span >= 0], minlength=size) for span in (self.span, self.teacher_span)
        )
        single = (of_student == 1) & (of_teacher == 1)
        return (self.span >= 0) & single[self.span.clamp(min=0)]

    def to(self, device: torch.device | str) -> TeacherView:
        return replace(self, **_moved(self, device))

    def model_inputs(self) -> dict[str, Any]:
        """Like `Batch.model_inputs`, of the teacher's own ids."""
        return _model_inputs(self)


@dataclass(kw_only=True)
class TopK:
    """K next tokens per target; what is missing of the mass is the rest of the vocabulary's. An entry of
    log-probability -inf stands for none, whatever its id."""

    ids: Tensor  # [B, T, K], distinct among those that stand for something
    logprobs: Tensor  # [B, T, K], natural logarithm, at `temperature`
    temperature: float = 1.0
    sampled: bool = False  # drawn at random, logprobs those of count / draws; else the K likeliest


@dataclass(kw_only=True)
class Voice:
    """One model of several whose distributions are mixed."""

    weight: Tensor  # [B, T], of its distribution in the mixture; the voices' sum to 1 wherever there is a signal
    hidden: Tensor  # [B, T, D] before the head
    head: Head


@dataclass(frozen=True, kw_only=True)
class Relations:
    """What one attention layer compares, before positions are rotated in."""

    queries: Tensor  # [B, T, H, D / H]
    keys: Tensor  # [B, T, H', D / H], H' < H with grouped queries
    values: Tensor  # [B, T, H', D / H]


@dataclass(kw_only=True)
class TeacherSignal:
    """What a teacher says of a batch; what nobody needs is None. Never dense logits of a whole batch:
    `hidden` and `head`, or `voices`, give them chunk by chunk, and `logits` is set only inside one chunk.

    All but `own_*` is at the student's positions, 0 where `TeacherView.position` is -1.
    """

    hidden: Tensor | None = None  # [B, T, D] before the head
    head: Head | None = None
    logits: Tensor | None = None  # [1, C, V] float32, of the chunk at hand
    voices: tuple[Voice, ...] | None = None  # in place of `hidden` and `head`: logits are log sum_i weight_i p_i, or …
    pool: Literal["probabilities", "logits"] = "probabilities"  # … sum_i weight_i logits_i
    topk: TopK | None = None
    logprobs: Tensor | None = None  # [B, T] of the targets
    hidden_states: tuple[Tensor, ...] | None = None  # [B, T, D] of embedding and layers; the last is normed
    attentions: tuple[Tensor, ...] | None = None  # per layer [B, H, T, T]
    relations: tuple[Relations, ...] | None = None  # per layer
    embedding: Tensor | None = None  # [V', D] of the input ids; with HIDDEN
    reward: Tensor | None = None  # [E]
    reference_logprobs: Tensor | None = None  # [B, T]
    own_hidden: Tensor | None = None  # [B, T', D] before the head, at the teacher's positions: another tokenizer's
    own_logprobs: Tensor | None = None  # [B, T'] of `TeacherView.targets`: another tokenizer's, with LOGPROBS
    _log_softmax: dict[float, Tensor] = field(default_factory=dict, repr=False)

    def log_p(self, temperature: float = 1.0) -> Tensor | None:
        """log softmax(logits / temperature), [1, C, V], once per temperature and chunk; None for a sparse teacher."""
        return None if self.logits is None else _log_softmax(self.logits, temperature, self._log_softmax)


@dataclass(kw_only=True)
class StudentOutput:
    """What the student computed, with a graph. Scope CHUNK sees one chunk of C supervised targets as B=1, T=C."""

    logits: Tensor | None = None  # [1, C, V] float32, of the chunk at hand: scope CHUNK
    logprobs: Tensor | None = None  # [B, T] float32 of the targets, 0 where not supervised: scope LOGPROBS
    hidden: Tensor | None = None  # [B, T, D] before the head: scope STATES, as all below
    head: Head | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # [B, T, D] of embedding and layers; the last is normed
    attentions: tuple[Tensor, ...] | None = None  # per layer [B, H, T, T]
    relations: tuple[Relations, ...] | None = None  # per layer
    embedding: Tensor | None = None  # [V', D] of the input ids
    bidirectional: bool = False  # a supervised position sees all supervised positions of its sequence, not those before
    _log_softmax: dict[float, Tensor] = field(default_factory=dict, repr=False)

    def log_q(self, temperature: float = 1.0) -> Tensor:
        """log softmax(logits / temperature), [1, C, V]; computed once per temperature and chunk."""
        assert self.logits is not None, "logits exist only inside a chunk"
        return _log_softmax(self.logits, temperature, self._log_softmax)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of a model that objectives depend on, known before its weights are loaded."""

    layers: int
    width: int  # D of the hidden states
    heads: int
    kv_heads: int  # H', fewer than `heads` with grouped queries
    head_width: int
    vocab_size: int  # real ids


@dataclass(frozen=True, kw_only=True)
class DomainLoss:
    """What a probe of held-out rows says of one domain, in nats per target, and what training did since the last
    update. None where nobody asked, or nobody can know."""

    student: float
    teacher: float | None = None
    student_per_byte: float | None = None  # of both models in place of the above where their tokenizers differ
    teacher_per_byte: float | None = None
    kl: float | None = None  # KL(teacher || student)
    alignment: float | None = None  # of the domain's gradient with those of the others (DoGE)
    trained: float | None = None  # mean training loss since the last update
    tokens: float | None = None  # the domain's share of the targets since the last update


@dataclass(kw_only=True)
class Scores:
    """Per-target scores of a model on a batch, [B, T] float32, 0 where `batch.mask` is False."""

    nll: Tensor  # nats, of the model scored
    teacher_nll: Tensor | None = None
    kl: Tensor | None = None  # KL(teacher || model)
    agree: Tensor | None = None  # 1.0 where both put the same token first
    correct: Tensor | None = None  # 1.0 where the model puts the target first
    teacher_correct: Tensor | None = None


# ------------------------------------------------------------------------------------ what can be plugged in


class Stateful:
    """Something whose state is part of a checkpoint: plain JSON values or tensors, no pickles."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        del state


class Teacher(Stateful, ABC):
    """The model one learns from. Weights are loaded by `load`, so that a config can be checked first. State is what it
    takes over from the student as that learns; a teacher that stays as it was has none."""

    provides: Need = Need.NOTHING
    tokenizer: Any = None  # a transformers tokenizer, from `load_tokenizer` on; None for `teacher=none`

    def load_tokenizer(self) -> Any:
        """Load and return the tokenizer alone (cheap; for checks before weights load)."""
        return None

    def load_task(self) -> Task | None:
        """What it makes of a row, without its weights; None for what works whatever the student makes of it."""
        return None

    def load(self, device: torch.device) -> None:
        """Load weights and tokenizer. Called once on every rank, before the first `annotate`."""

    def place(self, engine: Engine) -> None:
        """Where the model's parameters live among the ranks; called once, before `load`, on every rank."""
        del engine

    def fingerprint(self) -> str:
        """A hash of all that changes what it says of given ids: weights, dtype, what wraps them. Needs no `load`."""
        raise NotImplementedError(f"{type(self).__name__} cannot tell itself from another teacher")

    def follow(self, student: Student) -> None:
        """See the student as it begins, with its weights, before the engine takes it over; called once."""
        del student

    def after_step(self, student: Student, step: int, whole: Whole) -> None:
        """See the student after optimizer step `step` (1 is the first); on every rank."""
        del student, step, whole

    def shape(self) -> ModelShape | None:
        """The model's shape, without loading weights; None where it has no layers to see."""
        return None

    def architecture(self) -> Any:
        """The model's transformers config, without loading weights; None where it has none."""
        return None

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
    provides: Need = Need.NOTHING  # of HIDDEN, ATTENTION and RELATIONS, what `states` can give
    auto: str = "AutoModelForCausalLM"  # the class of transformers that makes and loads its model
    task: Task = Task()  # set before `load` (kdcli.store.tasks.task_of), since labels may be the teacher's

    def load_tokenizer(self) -> Any:
        """Load and return the tokenizer alone."""
        return None

    def load_task(self) -> Task:
        """What it makes of a row, as far as it says so itself, without its weights."""
        return self.task

    def configured(self, config: Any) -> Any:
        """A transformers config as the student's task needs it, for a StudentInit to build from."""
        return config

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

    def states(self, batch: Batch, needs: Need) -> StudentOutput:
        """`hidden`, and what `needs` has of HIDDEN, ATTENTION and RELATIONS, of one pass through the model."""
        assert not needs & (Need.HIDDEN | Need.ATTENTION | Need.RELATIONS), f"{type(self).__name__} gives no layers"
        return StudentOutput(hidden=self(batch))

    def prepared(self, tokenizer: Any) -> Any:
        """A tokenizer as the student will use it: with a template and new tokens of its own. Raises ConfigError."""
        return tokenizer

    def check(self, architecture: Callable[[], Any], tokenizer: Callable[[], Any]) -> None:
        """Raise ConfigError, before weights load, for settings that do not fit the model or the tokenizer it will have:
        `StudentInit.architecture` and `.load_tokenizer`, called where something depends on them."""
        del architecture, tokenizer

    def settle(self) -> None:
        """What happens to the model once a StudentInit is done with it, before training: new tokens, adapters, frozen
        weights."""

    def shape(self) -> ModelShape | None:
        """The model's shape, without loading weights; None where a StudentInit makes it."""
        return None

    def architecture(self) -> Any:
        """The model's transformers config, without loading weights; None where a StudentInit makes it."""
        return None


class StudentInit(ABC):
    """How the student's weights begin. `student` is changed in place, or its `model` replaced."""

    def load_tokenizer(self, student: Student, teacher: Teacher) -> Any:
        """The tokenizer the student will have, without loading weights: its own, or else the teacher's."""
        return student.load_tokenizer() or teacher.load_tokenizer()

    def shape(self, student: Student, teacher: Teacher) -> ModelShape | None:
        """The shape the student will have, without loading weights; by default its own."""
        return student.shape()

    def architecture(self, student: Student, teacher: Teacher) -> Any:
        """A transformers config whose model names its modules as the student's does, layers aside, without loading
        weights; None if nobody can tell. By default that of the student's own model, or else of the teacher's."""
        return student.architecture() or teacher.architecture()

    @abstractmethod
    def __call__(self, student: Student, teacher: Teacher) -> None: ...


class Objective(nn.Module, ABC):
    """A loss, unreduced: one number per target, per sequence or per group. Masks, sums, counts, weights and logs are
    the Distiller's. Subclasses say what they are by the attributes below and take keyword-only settings.

    A setting is kept under its own name as a plain attribute and read when it is used: a schedule may change it
    between steps. Parameters that an objective learns are trained and saved with the run.
    """

    needs: Need = Need.NOTHING  # of the teacher, and of the student's layers (HIDDEN, ATTENTION, RELATIONS)
    unit: ClassVar[Unit] = Unit.TOKEN
    scope: ClassVar[Scope] = Scope.CHUNK
    columns: frozenset[str] = frozenset()  # what its data must have: of "rejected", "score", "group"
    cross_tokenizer: ClassVar[bool] = False  # compares the models although their tokenizers differ

    def __init__(self, *, weight: float = 1.0, domains: Sequence[str] = (), reduction: Reduction = "token") -> None:
        super().__init__()
        self.weight = weight
        self.domains = tuple(domains)  # train on these domains only; empty is all
        self.reduction = reduction  # of unit TOKEN; the mean over units otherwise

    def fit(self, student: ModelShape, teacher: ModelShape | None) -> None:
        """Make the parameters whose size depends on the models; called once, before training, and before any weights
        load where both shapes are known. Raises ConfigError, such as for layers that do not exist."""
        del student, teacher

    def match(self, student: Any, teacher: Any) -> None:
        """See both tokenizers, once, before training: what ids mean on either side."""
        del student, teacher

    def units(self, batch: Batch) -> Tensor:
        """Which units this objective has a number for, bool: [B, T], [E] or [G]. The Distiller leaves out what is not
        supervised or of other domains. By default all, but of a preference pair's worse answer no target, and none
        that the teacher's own prompt has no place for, if the teacher is asked about targets."""
        if self.unit is Unit.TOKEN:
            units = torch.ones_like(batch.mask)
            if batch.rejected is not None:
                units &= ~batch.rejected[batch.segment.clamp(min=0)]
            view = batch.teacher
            if view is not None and not view.foreign and self.needs & (Need.DISTRIBUTION | Need.LOGITS | Need.LOGPROBS):
                units &= view.position >= 0
            return units
        number = batch.num_sequences if self.unit is Unit.SEQUENCE else int(batch.groups().max()) + 1
        return torch.ones(number, dtype=torch.bool, device=batch.mask.device)

    @abstractmethod
    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        """Values [B, T], [E] or [G] (`unit`), in nats, with a graph to the student; finite wherever `units` says."""

    def closed_form(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> tuple[Tensor, Tensor] | None:
        """Scope CHUNK: values [1, C] and their gradient with respect to the student's logits [1, C, V], or None to
        use autograd. Called without a graph; must equal what autograd gives through `forward`."""
        return None


class Rollout(Stateful, ABC):
    """Whose text is learned from: the data set's, the student's or the teacher's."""

    @abstractmethod
    def __call__(self, batch: Batch, student: Student, step: int) -> Batch: ...


class DomainScheduler(Stateful, ABC):
    """Domain weights from domain losses: arithmetic on dictionaries. Weights sum to 1."""

    interval: int = 0  # optimizer steps between updates; 0 is never
    signals: ClassVar[frozenset[str]] = frozenset()  # the fields of DomainLoss that it reads
    actuator: Literal["resample", "reweight"] = "resample"  # what weights act on: the rows drawn, or their loss
    quota: Literal["iid", "hamilton"] = "iid"  # rows of a step by independent draws, or by largest remainders

    def initial(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Weights before anything is known, from the number of training rows per domain."""
        total = sum(sizes.values())
        return {name: size / total for name, size in sizes.items()}

    def first(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        """Weights of the first interval, from the probe before the first step; by default `weights`, the initial ones.
        Not called where no signal needs a probe."""
        del losses
        return dict(weights)

    @abstractmethod
    def update(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        """Weights of the next interval, from those of the last and what was measured at its end."""


class Data(ABC):
    """Named domains of examples."""

    max_bad_fraction: float = 0.0  # share of rows that may be dropped instead of stopping the run

    @abstractmethod
    def domains(self) -> dict[str, Iterable[Example]]:
        """Domain name -> examples, re-iterable, in a fixed order. Raises ConfigError naming file and line."""

    def seeds(self) -> dict[str, Iterable[Example]]:
        """The same for an augmentation, which may begin with rows that are unfinished: a prompt without its response,
        a chat that ends with the user, a document or topic in `meta`. By default `domains`, which refuses them."""
        return self.domains()

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the content: equal content, equal fingerprint, wherever it lies."""

    def bad_rows(self) -> dict[str, str]:
        """Rows dropped since `domains` was called: where -> reason. Empty unless `max_bad_fraction` > 0."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a writer is asked once. Equal requests to one writer are one request, and are answered from the store."""

    messages: Sequence[Mapping[str, str]]  # [{"role": "system" | "user" | "assistant", "content": ...}]
    n: int = 1  # answers wanted
    seed: int = 0
    temperature: float | None = None  # None, here and below: as the writer's own settings say
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    form: Mapping[str, Any] | None = None  # {"json": schema} | {"regex": pattern} that a writer holds to if it can
    rehearsal: str = field(default="", compare=False)  # the answer of a rehearsal; no part of the request


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a writer wrote: the n texts of a request, or why there are none."""

    texts: Sequence[str] = ()
    finished: Sequence[str] = ()  # of each text: stop, length (cut off at max_tokens) or refusal
    prompt_tokens: int = 0
    completion_tokens: int = 0  # of all texts together
    model: str = ""  # as the server names it
    date: str = ""  # the day it was written, UTC, such as 2026-11-21
    failed: str = ""  # a short reason to count by, such as "HTTP 500"; empty if it was answered
    detail: str = ""  # what happened, in a sentence without the prompt or the answer


class Writer(ABC):
    """A model that writes text. The run asks it through a `Desk`, which stores its answers and counts what they cost.

    `write` is called by up to `concurrency` threads at once, each with up to `batch` requests.
    """

    concurrency: int = 1
    batch: int = 1
    price_prompt: float = 0.0  # of 1e6 prompt tokens, in the currency of budget.max_cost
    price_completion: float = 0.0  # of 1e6 tokens written
    license: str | None = None  # of its weights, an SPDX name; None: unknown
    terms: str | None = None  # the row of the table of terms that holds for its answers; None: by license and endpoint

    @abstractmethod
    def write(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request, in order. A request that failed for itself gets `Answer(failed=...)`.

        Raises ConfigError where asking on is of no use: no key or a wrong one, an unknown model, a refused address.
        """

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """JSON: all that its answers depend on besides the request: model, revision, endpoint, sampling settings. Never
        a key. Two writers of equal identity share stored answers."""

    @property
    @abstractmethod
    def endpoint(self) -> str:
        """For provenance: HOST:PORT of a server, or `local`."""

    @property
    @abstractmethod
    def model(self) -> str:
        """For provenance: the model's name."""

    def count_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Tokens of a prompt, for plans. Without a tokenizer at hand: a token per 4 bytes, rounded up."""
        return sum(-(-len(m["content"].encode()) // 4) + 4 for m in messages)

    def close(self) -> None: ...


class Desk(Protocol):
    """What a run gives a step of augmentation: writers that are never asked the same twice, a place for rows that
    are set aside, seeds, and memory that survives a crash."""

    step: str  # the step's name in the config
    rehearsal: bool  # a plan is made: writers answer with `Request.rehearsal`, filters keep every row
    folder: Path  # the step's own, for scratch files; empty when the step begins

    def ask(self, writer: str, questions: Iterable[tuple[T, Request]]) -> Iterator[tuple[T, Answer]]:
        """Answers in the order of the questions, whatever the concurrency. Questions are read some hundreds ahead."""
        ...

    def aside(self, example: Example, reason: str, detail: str = "", text: str = "") -> None:
        """Keep a row out of what follows, with a short reason to count by, a sentence and what was written for it."""
        ...

    def seed(self, *parts: str | int) -> int:
        """0 to 2**31 - 1, a hash of run.seed, the step's name and `parts`: draw from it, never from global state."""
        ...

    def remember(self, kind: str, keys: Sequence[str], compute: Callable[[Sequence[int]], Sequence[Any]]) -> list[Any]:
        """JSON values by key, of a `kind` that names model and settings; `compute` gets the indices of those that are
        not stored yet. For what is dear to compute here, such as a local model's scores."""
        ...

    def provenance(self, writer: str, answer: Answer, template: str) -> dict[str, Any]:
        """What `meta.written` says of one answer: step, by, teacher, endpoint, date, template (its hash), terms."""
        ...


class Transform(ABC):
    """A step of augmentation, or a filter: examples in, examples out, in an order that nothing but the input decides.

    Rows pass one at a time or in blocks, never all in memory. Rows of equal `group` stand together, and stay so.
    """

    version: ClassVar[int] = 1  # raise it when equal input gives other output: stored results are then not used again
    desk: Desk

    @abstractmethod
    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]: ...

    def open(self, desk: Desk) -> None:
        """Called once, before the first row."""
        self.desk = desk

    def writers(self) -> Sequence[str]:
        """Names of the section `writer` that it asks."""
        return ()

    def fingerprint(self) -> str:
        """A hash of what its output depends on besides rows and settings: prompts, files, models it reads."""
        return ""


class Subject(Protocol):
    """What an evaluation may ask of the model it evaluates. With several ranks every rank calls `score`
    equally often (sharded parameters are gathered in it)."""

    tokenizer: Any
    rank: int
    world_size: int
    folder: Path  # the run's, for what an evaluation writes from rank 0
    reading: Mapping[str, Any] = {}  # what kdcli.text.tokenize.encode must know besides the tokenizer

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

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside, each of `parameters` is whole on every rank, for reading. A collective."""
        del parameters
        return nullcontext()

    def sharded(self, load: Callable[[], Any], dtype: torch.dtype) -> Any:
        """What `load` builds, a transformers model in `dtype`, frozen, each parameter split over the ranks as it is
        loaded and gathered while it is used, whatever this engine does with the student. A collective, as is every
        pass through the model; its parameters are read inside `whole`."""
        raise NotImplementedError(f"{type(self).__name__} cannot split a frozen model")

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write this rank's shards of model, optimizer and schedule into `folder`."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote, also for another world size."""

    def saved(self, folder: Path) -> Mapping[str, Callable[[], Tensor]]:
        """The module's parameters and buffers of what `save` wrote, of any world size, each read whole when called.
        Needs no `start`, `prepare` or other rank."""
        raise NotImplementedError(f"{type(self).__name__} cannot read a checkpoint without its models")

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
