"""A transformers model on this machine, asked in batches; it can be held to JSON schemas and patterns (llguidance)."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import yaml

from kdcli.api import Answer, Request, Writer
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.store.adapters import require
from kdcli.store.models import load_model, load_tokenizer, real_ids
from kdcli.store.weights import model_fingerprint
from kdcli.writer._forms import grammar
from kdcli.writer._generation import Generator, Row
from kdcli.writer._served import today

log = logging.getLogger(__name__)

LOOSE = 64  # characters per token: more than any text has, so that max_tokens ends it and not its form
CLOSED = ((1, False), (1, True))  # characters per token, and whether of one byte each: what always fits
FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


class HFWriter(Writer):
    """A folder, a hub id, `recipes://…` or a GGUF file (`package://DISTRIBUTION/FILE.gguf`), in `dtype`; null is
    bfloat16 on a GPU and float32 on a CPU.

    Messages go through the tokenizer's chat template, or `chat_template` (Jinja source, or "none"); without one their
    contents are joined by blank lines, and the model goes on from there. What is drawn for a token depends on the
    request's seed, the sample and the position, so texts do not depend on what else is in a batch, but where rounding
    errors tip the scale.

    With `constrain`, an answer to a request with a form has that form as far as max_tokens reach; one that does not end
    by then is cut off, as free text is. With `closed`, repeats and strings get a greatest length, so that every answer
    has its whole form within max_tokens and counts as finished, though its texts may stop in the middle: for trying
    pipelines out with models that never come to an end. A form that llguidance does not know is not held to, which is
    told once.

    Raises ConfigError where there is no such model, or no llguidance for `constrain`.
    """

    def __init__(
        self,
        *,
        path: str,
        revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        attention: str | None = None,
        device: str = "auto",
        batch: int = 8,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 512,
        chat_template: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        constrain: bool = True,
        closed: bool = False,
        license: str | None = None,
        terms: str | None = None,
    ) -> None:
        for name, value, fits in (
            ("batch", batch, batch >= 1),
            ("max_tokens", max_tokens, max_tokens >= 1),
            ("temperature", temperature, temperature >= 0),
            ("top_p", top_p, 0 < top_p <= 1),
        ):
            if not fits:
                raise ConfigError(f"writer.{name}: {value} is out of range; see configs/writer/hf.yaml")
        if constrain:
            require("llguidance", "augment", "writer.constrain=true")
        self.path = path
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.dtype = dtype or ("float32" if self.device.type == "cpu" else "bfloat16")
        self.attention = attention
        self.batch = batch
        self.temperature, self.top_p, self.max_tokens = temperature, top_p, max_tokens
        self.chat_template = chat_template
        self.template_arguments = dict(template_arguments or {})
        self.constrain = constrain
        self.closed = closed
        self.license = license or _license_beside(path)
        self.terms = terms
        self.tokenizer: Any = None
        self._generator: Generator | None = None
        self._guide: Any = None  # llguidance.LLTokenizer
        self._matchers: dict[str, Any] = {}  # compiled forms; None for one that cannot be held to
        self._context: int | None = None
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return "local"

    @property
    def model(self) -> str:
        return self.path

    def identity(self) -> Mapping[str, Any]:
        return {
            "kind": "hf",
            "weights": model_fingerprint(self.path, self.dtype, self.revision),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "chat_template": self.chat_template,
            "template_arguments": self.template_arguments,
            "constrain": self.constrain,
            "closed": self.closed,
        }

    def count_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        return len(self._prompt(messages))

    def load_tokenizer(self) -> Any:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)
        return self.tokenizer

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        with self._lock:
            self._load()
            prompts = [self._prompted(request) for request in requests]
            rows = [
                [] if isinstance(prompt, Answer) else self._rows(request, prompt)
                for request, prompt in zip(requests, prompts, strict=True)
            ]
            self._generate([(request, row) for request, own in zip(requests, rows, strict=True) for row in own])
            return [
                prompt if isinstance(prompt, Answer) else self._answer(request, len(prompt), own)
                for request, prompt, own in zip(requests, prompts, rows, strict=True)
            ]

    def close(self) -> None:
        self._generator = None

    # ---------------------------------------------------------------------------------------------------- before

    def _load(self) -> None:
        if self._generator is not None:
            return
        tokenizer = self.load_tokenizer()
        model = load_model(
            self.path,
            dtype=self.dtype,
            device=self.device,
            attention=self.attention,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        ).requires_grad_(False)
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._generator = Generator(model, tokenizer, vocabulary=real_ids(tokenizer))
        if self.constrain:
            self._guide = _guide(tokenizer, model)

    def _prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation that the model is to go on with."""
        tokenizer = self.load_tokenizer()
        template = self.chat_template or tokenizer.chat_template
        if template is None or template == "none":
            return tokenizer("\n\n".join(message["content"] for message in messages)).input_ids
        begun = messages[-1]["role"] == "assistant"
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self.chat_template,
            add_generation_prompt=not begun,
            continue_final_message=begun,
            tokenize=True,
            return_dict=False,
            **self.template_arguments,
        )

    def _prompted(self, request: Request) -> list[int] | Answer:
        """The prompt, or why there can be no answer."""
        import jinja2

        try:
            ids = self._prompt(request.messages)
        except jinja2.TemplateError as error:
            return self._failed("chat template", f"the model's chat template refuses the messages: {error}")
        if self._context is not None and len(ids) >= self._context:
            told = f"the prompt has {len(ids)} tokens, and the model's context {self._context}"
            return self._failed("context too long", told)
        return ids

    def _rows(self, request: Request, prompt: list[int]) -> list[Row]:
        most = request.max_tokens or self.max_tokens
        if self._context is not None:
            most = min(most, self._context - len(prompt))
        return [
            Row(
                prompt=prompt,
                most=most,
                temperature=self.temperature if request.temperature is None else request.temperature,
                top_p=self.top_p,
                seed=(request.seed, sample),
                stop=tuple(request.stop),
            )
            for sample in range(request.n)
        ]

    # ---------------------------------------------------------------------------------------------------- writing

    def _generate(self, work: Sequence[tuple[Request, Row]]) -> None:
        """Write all rows, `batch` at a time, the longest first; closed ones until their form fits."""
        waiting = list(work)
        for per_token, ascii_only in CLOSED if self.closed else ((LOOSE, False),):
            for request, row in waiting:
                row.ids, row.said, row.finished = [], False, ""
                row.matcher = self._matcher(request.form, per_token * row.most, ascii_only)
            self._run([row for _, row in waiting])
            waiting = [(q, row) for q, row in waiting if row.matcher is not None and row.finished == "length"]

    def _run(self, rows: list[Row]) -> None:
        assert self._generator is not None
        rows.sort(key=lambda row: (row.most, len(row.prompt)), reverse=True)
        for start in range(0, len(rows), self.batch):
            try:
                self._generator(rows[start : start + self.batch])
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"writer.batch: {self.batch} texts at a time do not fit into the memory of {self.device}; lower it"
                ) from error

    def _matcher(self, form: Mapping[str, Any] | None, characters: int, ascii_only: bool) -> Any:
        """What holds a text to a form; None for free text."""
        if form is None or not self.constrain or self._guide is None:
            return None
        text = grammar(form, characters, ascii_only=ascii_only)
        if text not in self._matchers:
            if len(self._matchers) >= 256:
                self._matchers.clear()
            self._matchers[text] = self._compiled(text)
        known = self._matchers[text]
        return None if known is None else known.deep_copy()

    def _compiled(self, text: str) -> Any:
        """A form ready to hold a text to; None, which is told, if there is no such form."""
        from llguidance import LLMatcher

        made = LLMatcher(self._guide, text, log_level=0)
        if not made.is_error():
            return made
        reason = " ".join(made.get_error().split())[:200]
        log.warning("writer: a form cannot be held to, and is left to the model: %s", reason)
        return None

    # ------------------------------------------------------------------------------------------------------ after

    def _answer(self, request: Request, prompt: int, rows: Sequence[Row]) -> Answer:
        texts = [self._text(row) for row in rows]
        if any(not text.strip() for text in texts):
            return self._failed("empty answer", "the model wrote nothing but white space")
        return Answer(
            texts=texts,
            finished=[row.finished for row in rows],
            prompt_tokens=prompt,
            completion_tokens=sum(len(row.ids) for row in rows),
            model=self.model,
            date=today(),
        )

    def _text(self, row: Row) -> str:
        text: str = self.tokenizer.decode(row.ids, skip_special_tokens=True)
        ends = [place for stop in row.stop if (place := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def _failed(self, short: str, detail: str) -> Answer:
        return Answer(failed=short, detail=detail, model=self.model, date=today())


def _guide(tokenizer: Any, model: Any) -> Any:
    """llguidance's own view of the tokenizer; None where it is not a fast one."""
    import llguidance.hf

    if not getattr(tokenizer, "is_fast", False):
        log.warning("writer: answers are held to no form, since the model has no fast tokenizer")
        return None
    return llguidance.hf.from_tokenizer(
        tokenizer, n_vocab=max(model.config.get_text_config().vocab_size, len(tokenizer))
    )


def _license_beside(path: str) -> str | None:
    """What the model card in a model's folder says."""
    try:
        folder = paths.resolve(path)
        front = FRONT.match((folder / "README.md").read_text("utf-8"))
        card = yaml.safe_load(front[1]) if front else {}
    except (ConfigError, OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    found = card.get("license") if isinstance(card, dict) else None
    if found == "other":
        found = card.get("license_name") or None
    return found if isinstance(found, str) else None
