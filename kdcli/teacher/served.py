"""A teacher behind a server: the k likeliest next tokens of given ids, and the log-probabilities of the targets.

| server | what it gives of a prompt's tokens | `protocol` |
| --- | --- | --- |
| vLLM | the k likeliest, by id | `vllm` |
| SGLang | the k likeliest, by id | `sglang` |
| `echo` and `logprobs` in `/v1/completions`, as of llama-cpp-python | the k likeliest, by id or text | `openai` |
| `transformers serve`, llama.cpp's `llama-server`, hosted chat models | nothing: text alone, which is refused here | |
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import xxhash

from kdcli.api import Batch, Need, Teacher, TeacherSignal, TopK
from kdcli.errors import ConfigError, KDError
from kdcli.store.http import BadAnswerError, Client, Question, RefusedError
from kdcli.store.models import load_tokenizer
from kdcli.teacher._asked import Asked, placed
from kdcli.teacher._protocols import AbsentError, Protocol, Scored, Vocabulary, candidates, readable, scored

log = logging.getLogger(__name__)

PROBED = 32  # ids of the first question, spread over the vocabulary


class ServedTeacher(Teacher):
    """The signal holds `topk` [B, T, k] and `logprobs` [B, T], both at temperature 1: the log-probabilities of other
    temperatures cannot be had from the top k of this one. Where a model has more rows than its tokenizer has ids, the
    server's softmax is over all of them; their mass counts as the rest's.

    Whole sequences are sent as ids of `tokenizer`, which must be the served model's own: the answers are compared with
    what was sent, and the first question with how the server writes ids out. `load` asks which protocol the server
    speaks. What comes back does not depend on `concurrency`. A teacher with another tokenizer than the student's gives
    `own_logprobs` alone.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        tokenizer: str,
        k: int = 64,
        protocol: Literal["auto", "vllm", "sglang", "openai"] = "auto",
        temperature: float = 1.0,
        api_key_env: str | None = None,
        allow_private: bool = False,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 8,
        deadline: float = 300.0,
        revision: str | None = None,
    ) -> None:
        if temperature != 1.0:
            raise ConfigError(
                f"teacher.temperature: {temperature}, but servers give log-probabilities at temperature 1, and the "
                "top k of one temperature does not tell those of another; set it to 1, or choose teacher=hf"
            )
        if k < 1:
            raise ConfigError(f"teacher.k: {k} entries hold no distribution; set at least 1")
        self.client = Client(
            url,
            api_key_env=api_key_env,
            allow_private=allow_private,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            deadline=deadline,
        )
        self.served_model = model
        self.tokenizer_path = tokenizer
        self.k = k
        self.protocol = protocol
        self.temperature = temperature
        self.revision = revision
        self.provides = Need.DISTRIBUTION | Need.LOGPROBS
        self._vocabulary: Vocabulary | None = None
        self._spoken: Protocol | None = None

    def load_tokenizer(self) -> Any:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.tokenizer_path)
        return self.tokenizer

    def load(self, device: torch.device) -> None:
        """Ask the server what it offers. Raises ConfigError if that is not what was declared, or text alone."""
        del device
        self._vocabulary = Vocabulary(self.load_tokenizer())
        self._spoken = self._find()
        self._try_out()
        log.info(
            "teacher: %s, model %s, protocol %s, the %d likeliest of each target",
            self.client.server.url,
            self.served_model,
            self._spoken.name,
            min(self.k, self._vocabulary.size),
        )

    def fingerprint(self) -> str:
        """Of what is declared: model, revision, protocol, k and the tokenizer's content, wherever the server is. That
        the server's weights are those, nobody but its owner knows: change `revision` with them."""
        vocabulary = sorted(self.load_tokenizer().get_vocab().items())
        told = ["served", self.served_model, self.revision, self.protocol, self.k, vocabulary]
        return xxhash.xxh3_128_hexdigest(json.dumps(told).encode())

    @torch.no_grad()
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        """One request per sequence with a supervised target. Raises ConfigError where the server says no, KDError
        where it gives no usable answer within the retries and the deadline."""
        if not needs & self.provides:
            return TeacherSignal()
        view = batch.teacher
        asked = Asked.of(batch)
        foreign = view is not None and view.foreign
        k = self.k if Need.DISTRIBUTION in needs and not foreign else 0
        answers = self._answers(asked, k)
        logprobs = asked.spread([answer.targets for answer in answers], 0.0)
        if foreign:
            return TeacherSignal(own_logprobs=logprobs if Need.LOGPROBS in needs else None)
        topk = None
        if k:
            width = min(k, self._known.size)
            topk = TopK(
                ids=placed(asked.spread([answer.ids for answer in answers], 0, width), view),
                logprobs=placed(asked.spread([answer.logprobs for answer in answers], -torch.inf, width), view),
                temperature=self.temperature,
            )
        return TeacherSignal(topk=topk, logprobs=placed(logprobs, view) if Need.LOGPROBS in needs else None)

    def _answers(self, asked: Asked, k: int) -> list[Scored]:
        try:
            return self.client.ask_all([self._asking(one.ids, one.first, k) for one in asked.sequences])
        except RefusedError as error:
            if error.status not in (400, 413, 422):
                raise
            longest = max(len(one.ids) for one in asked.sequences)
            raise ConfigError(
                f"{error}; the longest sequence sent has {longest} tokens: if those are too many for the server, set "
                "batch.max_length lower, or start it with a longer context (vLLM: --max-model-len)"
            ) from error

    @property
    def _known(self) -> Vocabulary:
        assert self._vocabulary is not None, "load() comes before annotate()"
        return self._vocabulary

    def _asking(self, ids: Sequence[int], first: int, k: int) -> tuple[Question, Callable[[Any], Scored]]:
        spoken = self._spoken
        assert spoken is not None, "load() comes before annotate()"
        return spoken.question(ids, first, k), lambda answer: scored(spoken, answer, ids, first, k, self._known)

    def _find(self) -> Protocol:
        """The first protocol by which the server gives log-probabilities of a prompt."""
        ids, reasons = self._spread_ids(), []
        known = candidates(self.protocol, self.served_model)
        for candidate in known:

            def offered(answer: Any, candidate: Protocol = candidate) -> str:
                try:
                    scored(candidate, answer, ids, 1, 1, self._known)
                except AbsentError as error:
                    return str(error)
                with readable():
                    self._compare(candidate.texts(answer))
                return ""

            try:
                # A server that answered the first may answer anything to what it does not know.
                retries = None if candidate is known[0] else min(2, self.client.retries)
                reason = self.client.ask(candidate.question(ids, 1, 1, texts=True), offered, retries=retries)
            except BadAnswerError as error:
                reason = str(error.__cause__)
            except RefusedError as error:
                if error.status in (401, 403) or 300 <= error.status < 400:
                    raise
                reason = f"HTTP {error.status}{error.said and f' ({error.said})'}"
            if not reason:
                return candidate
            reasons.append(f"{candidate.name}: {reason}")
        raise ConfigError(self._not_offered(list(dict.fromkeys(reasons))))

    def _compare(self, written: Mapping[int, str]) -> None:
        """Raise ConfigError if the server writes ids otherwise than the tokenizer does."""
        if 2 * sum(self._known.differs(index, text) for index, text in written.items()) > len(written):
            raise ConfigError(
                f"teacher.tokenizer: {self.client.server.name} writes most ids otherwise than {self.tokenizer_path} "
                "does, so the served model has another tokenizer; set teacher.tokenizer to the served model's own"
            )

    def _try_out(self) -> None:
        """Ask for k entries, of one target, which a server may be too limited for."""
        ids = self._spread_ids()[-2:]
        try:
            self.client.ask(*self._asking(ids, 1, self.k))
        except RefusedError as error:
            raise ConfigError(
                f"{error}; it was asked for teacher.k={self.k} log-probabilities per target: start it with a higher "
                f"limit (vLLM: --max-logprobs {self.k}), or set a lower teacher.k"
            ) from error

    def _spread_ids(self) -> list[int]:
        """Ordinary ids from the whole range, the last among them: a smaller vocabulary is refused by the server."""
        ordinary = [index for index in self._known.known if index not in self._known.special]
        number = min(PROBED, len(ordinary))
        return [ordinary[place * (len(ordinary) - 1) // max(1, number - 1)] for place in range(number)]

    def _not_offered(self, reasons: Sequence[str]) -> str:
        """What to do with a server that gives no log-probabilities of a prompt."""
        name = self.client.server.name
        if self._writes() and self.protocol == "auto":
            return (
                f"teacher: {name} serves text alone, and no log-probabilities of given tokens ({'; '.join(reasons)}), "
                "from which nothing but cross_entropy on its answers can be learned; write them into the data and set "
                "teacher=none, or serve the model with vLLM or SGLang"
            )
        other = "" if self.protocol == "auto" else ", set teacher.protocol=auto"
        return (
            f"teacher: {name} gives no log-probabilities of given tokens ({'; '.join(reasons)}); check teacher.url, "
            f"which often ends in /v1, and teacher.model{other}, or serve the model with vLLM or SGLang"
        )

    def _writes(self) -> bool:
        """Whether the server completes a prompt of text."""
        body = {"model": self.served_model, "prompt": "1 2 3", "max_tokens": 1}
        try:
            return self.client.ask(
                Question("completions", body, 1 << 20), lambda answer: isinstance(answer["choices"][0]["text"], str)
            )
        except (KDError, KeyError, IndexError, TypeError):
            return False
