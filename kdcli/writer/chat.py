"""A model behind an OpenAI-compatible server: any provider's, vLLM's, SGLang's or llama.cpp's /chat/completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

from kdcli.api import Answer, Request
from kdcli.store.http import BadAnswerError, Client, Question
from kdcli.writer._served import Pricing, Served, closed, counted, limit, today, tokens

Structured = Literal["auto", "response_format", "guided", "none"]
FINISHED = {  # how servers say why a text ended -> stop, length or refusal
    **dict.fromkeys(("stop", "eos", "end_turn", "stop_sequence", "eos_token"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_length", "model_length"), "length"),
    **dict.fromkeys(("content_filter", "refusal", "safety"), "refusal"),
}


class ChatWriter(Served):
    """One request asks for all n samples; where a server gives fewer, it is asked for the rest, with seeds of their
    own. An answer of another shape than OpenAI documents, an empty text and a text without a finish_reason are
    failures: asked again, and then told, never taken for data.

    A request's `form` is sent as `response_format` (JSON schema) or as vLLM's `structured_outputs` (JSON schema or
    regex); `auto` takes the first for schemas and the second for patterns, and goes on without once the server says
    that it does not know the field. What a reasoning model thought is left out, or put in front of the answer in
    <think> tags with `keep_reasoning`.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        api_key_env: str | None = None,
        allow_private: bool = False,
        concurrency: int = 16,
        timeout: float = 300.0,
        retries: int = 6,
        deadline: float = 900.0,
        temperature: float | None = 1.0,
        top_p: float | None = 1.0,
        max_tokens: int = 512,
        max_tokens_name: str = "max_tokens",
        send_seed: bool = True,
        structured: Structured = "auto",
        keep_reasoning: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        **pricing: Unpack[Pricing],
    ) -> None:
        client = Client(
            url,
            api_key_env=api_key_env,
            allow_private=allow_private,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            deadline=deadline,
            where="writer",
        )
        super().__init__(
            client,
            model=model,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            extra_body=extra_body,
            **pricing,
        )
        self.max_tokens_name = max_tokens_name
        self.send_seed = send_seed
        self.structured: Structured = structured
        self.keep_reasoning = keep_reasoning

    def identity(self) -> Mapping[str, Any]:
        return {
            "kind": "chat",
            "url": self.client.server.url,
            "model": self.served_model,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "send_seed": self.send_seed,
            "structured": self.structured,
            "keep_reasoning": self.keep_reasoning,
            "extra_body": self.extra_body,
        }

    def _written(self, request: Request) -> Answer:
        texts, total = self._asked(request)
        texts = texts[: request.n]
        while len(texts) < request.n:
            asked = replace(request, n=request.n - len(texts), seed=(request.seed + len(texts)) % 2**31)
            found, one = self._asked(asked)
            texts += found[: asked.n]
            total = replace(
                one,
                prompt_tokens=total.prompt_tokens + one.prompt_tokens,
                completion_tokens=total.completion_tokens + one.completion_tokens,
            )
        return replace(total, texts=[text for text, _ in texts], finished=[finished for _, finished in texts])

    def _asked(self, request: Request) -> tuple[list[tuple[str, str]], Answer]:
        def ask(field: str) -> tuple[list[tuple[str, str]], Answer]:
            return self.client.ask(self._question(request, field), self._reader(request), given_up=self._given_up)

        return self._held(self._form_field(request.form), ask, given_up=self.structured == "auto")

    def _question(self, request: Request, field: str) -> Question:
        max_tokens = request.max_tokens or self.max_tokens
        temperature = self.temperature if request.temperature is None else request.temperature
        body: dict[str, Any] = {
            "model": self.served_model,
            "messages": [dict(message) for message in request.messages],
            self.max_tokens_name: max_tokens,
        }
        body |= {"n": request.n} if request.n > 1 else {}
        body |= {"temperature": temperature} if temperature is not None else {}
        body |= {"top_p": self.top_p} if self.top_p is not None else {}
        body |= {"seed": request.seed} if self.send_seed else {}
        body |= {"stop": list(request.stop)} if request.stop else {}
        body |= _form(field, request.form or {})
        return Question("chat/completions", body | self.extra_body, limit(max_tokens, request.n))

    def _form_field(self, form: Mapping[str, Any] | None) -> str:
        """The field of the request that holds the answer to a form; empty for none."""
        if not form or self.structured == "none":
            return ""
        if self.structured == "guided":
            return "structured_outputs"
        if "json" in form:
            return "response_format"
        return "structured_outputs" if self.structured == "auto" else ""

    def _reader(self, request: Request) -> Callable[[Any], tuple[list[tuple[str, str]], Answer]]:
        def read(answer: Any) -> tuple[list[tuple[str, str]], Answer]:
            if not isinstance(answer, Mapping) or not isinstance(answer.get("choices"), list) or not answer["choices"]:
                raise BadAnswerError("an answer without choices", "no choices")
            texts = [self._text(choice) for choice in sorted(answer["choices"], key=_index)]
            usage, model = answer.get("usage"), answer.get("model")
            return texts, Answer(
                prompt_tokens=counted(usage, "prompt_tokens", lambda: self.count_tokens(request.messages)),
                completion_tokens=counted(usage, "completion_tokens", lambda: tokens([text for text, _ in texts])),
                model=model if isinstance(model, str) and model else self.served_model,
                date=today(),
            )

        return read

    def _text(self, choice: Any) -> tuple[str, str]:
        """Text of one choice, and why it ended."""
        message = choice.get("message") if isinstance(choice, Mapping) else None
        if not isinstance(message, Mapping):
            raise BadAnswerError("a choice without a message", "no message")
        told = choice.get("finish_reason")
        if not isinstance(told, str):
            raise BadAnswerError("a text without a finish_reason, so it may be incomplete", "incomplete answer")
        finished = FINISHED.get(told.lower())
        if finished is None:
            raise BadAnswerError(f"a text that ended with {told[:40]!r}", "no text")
        text = _joined(message.get("content"))
        if not text.strip() and isinstance(message.get("refusal"), str) and message["refusal"].strip():
            return message["refusal"], "refusal"
        if not text.strip() and finished == "stop":
            raise BadAnswerError("an empty text", "empty answer")
        thought = message.get("reasoning_content") or message.get("reasoning")
        if self.keep_reasoning and isinstance(thought, str) and thought.strip():
            text = f"<think>\n{thought.strip()}\n</think>\n\n{text}"
        return text, finished


def _form(field: str, form: Mapping[str, Any]) -> dict[str, Any]:
    if not field:
        return {}
    if field == "structured_outputs":
        return {field: {key: form[key] for key in ("json", "regex") if key in form}}
    schema = form["json"]
    return {
        field: {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": closed(schema)}}
    }


def _joined(content: Any) -> str:
    """The text of a message: a string, or the parts that some servers send."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence) or any(not isinstance(part, Mapping) for part in content):
        raise BadAnswerError("a message whose content is no text", "no text")
    return "".join(part["text"] for part in content if isinstance(part.get("text"), str))


def _index(choice: Any) -> int:
    index = choice.get("index") if isinstance(choice, Mapping) else None
    return index if isinstance(index, int) else 0
