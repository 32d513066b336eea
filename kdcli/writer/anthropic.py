"""Anthropic's Messages API: its own client library speaks the format, our client carries it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Unpack

from kdcli.api import Answer, Request
from kdcli.errors import KDError
from kdcli.store.adapters import require
from kdcli.store.http import BadAnswerError, Client, Question
from kdcli.writer._served import Pricing, Served, closed, counted, limit, today, tokens

FINISHED = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "refusal": "refusal"}
FINISHED |= {"model_context_window_exceeded": "length"}
SDK = ("anthropic-version", "anthropic-beta", "user-agent")  # headers of the library that go on to the server


class AnthropicWriter(Served):
    """Messages of role system become the `system` of the request, and n samples are n requests. The API takes no seed:
    samples differ by chance alone, and stored answers are what makes a run repeatable.

    The `anthropic` library builds requests and reads answers; what it sends goes through `Client`, with its guards and
    retries (529, overloaded, among them), in place of the library's own. The library never sees the key, and no
    variable of the environment but `api_key_env` and `SSL_CERT_FILE` changes where anything goes.

    A JSON schema all of whose objects are closed goes along as `output_config`; with `auto`, until the server says that
    it does not know the field. Patterns and open schemas the API cannot hold to.

    Raises ConfigError where `anthropic` is not installed.
    """

    def __init__(
        self,
        *,
        model: str,
        url: str = "https://api.anthropic.com",
        api_key_env: str = "ANTHROPIC_API_KEY",
        allow_private: bool = False,
        concurrency: int = 8,
        timeout: float = 300.0,
        retries: int = 6,
        deadline: float = 900.0,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int = 512,
        structured: Literal["auto", "output_config", "none"] = "auto",
        extra_body: Mapping[str, Any] | None = None,
        **pricing: Unpack[Pricing],
    ) -> None:
        require("anthropic", "augment", "writer=anthropic")
        client = Client(
            url,
            api_key_env=api_key_env,
            allow_private=allow_private,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            deadline=deadline,
            where="writer",
            key_header="x-api-key",
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
        self.structured = structured
        self._library: Any = None

    def identity(self) -> Mapping[str, Any]:
        return {
            "kind": "anthropic",
            "url": self.client.server.url,
            "model": self.served_model,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "structured": self.structured,
            "extra_body": self.extra_body,
        }

    def _written(self, request: Request) -> Answer:
        answers = [self._asked(request) for _ in range(request.n)]
        return replace(
            answers[-1],
            texts=[answer.texts[0] for answer in answers],
            finished=[answer.finished[0] for answer in answers],
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            completion_tokens=sum(answer.completion_tokens for answer in answers),
        )

    def _asked(self, request: Request) -> Answer:
        """One sample."""
        form = request.form or {}
        held = self.structured != "none" and "json" in form and closed(form["json"])
        message = self._held(
            "output_config" if held else "",
            lambda field: self._message(request, field),
            given_up=self.structured == "auto",
        )
        text, finished = _text(message.model_dump())
        usage = message.usage.model_dump() if message.usage else None
        cached = sum(counted(usage, f"cache_{kind}_input_tokens", int) for kind in ("creation", "read"))
        return Answer(
            texts=[text],
            finished=[finished],
            prompt_tokens=counted(usage, "input_tokens", lambda: self.count_tokens(request.messages)) + cached,
            completion_tokens=counted(usage, "output_tokens", lambda: tokens([text])),
            model=message.model or self.served_model,
            date=today(),
        )

    def _message(self, request: Request, field: str) -> Any:
        """The library's Message. Raises what `Client.ask` raises."""
        import anthropic

        system = "\n\n".join(message["content"] for message in request.messages if message["role"] == "system")
        temperature = self.temperature if request.temperature is None else request.temperature
        options: dict[str, Any] = {"system": system} if system else {}
        options |= {"stop_sequences": list(request.stop)} if request.stop else {}
        if field and request.form:
            options[field] = {"format": {"type": "json_schema", "schema": request.form["json"]}}
        more = {"temperature": temperature, "top_p": self.top_p}  # no arguments of the library, from its version 2 on
        try:
            return self._opened().messages.create(
                model=self.served_model,
                messages=[dict(message) for message in request.messages if message["role"] != "system"],
                max_tokens=request.max_tokens or self.max_tokens,
                extra_body={name: value for name, value in more.items() if value is not None} | self.extra_body,
                timeout=self.client.deadline,  # said so that the library sets no limit on max_tokens; ours hold
                **options,
            )
        except anthropic.APIConnectionError as error:
            if isinstance(error.__cause__, KDError):
                raise error.__cause__ from None  # what `Client` says of it
            raise

    def _opened(self) -> Any:
        if self._library is None:
            import anthropic
            import httpx2

            logging.getLogger("anthropic").setLevel(logging.WARNING)  # ANTHROPIC_LOG=debug would log prompts
            self._library = anthropic.Anthropic(
                api_key="sent by kdcli.store.http.Client",
                base_url=self.client.server.url,
                max_retries=0,
                http_client=httpx2.Client(transport=_transport(self), trust_env=False, follow_redirects=False),
                open_telemetry=False,
            )
        return self._library


def _transport(writer: AnthropicWriter) -> Any:
    """What carries the library's requests: `Client.ask`, which hands on nothing but a whole answer."""
    import httpx2

    class Carried(httpx2.BaseTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            body = json.loads(request.read())
            question = Question(
                "v1/messages",
                body,
                limit(body["max_tokens"], 1),
                {name: request.headers[name] for name in SDK if name in request.headers},
            )
            content = writer.client.ask(question, _whole, given_up=writer._given_up)
            return httpx2.Response(200, json=content, request=request)

    return Carried()


def _whole(answer: Any) -> dict[str, Any]:
    """An answer, if it is one: with a text, and a reason why it ended."""
    if not isinstance(answer, dict) or not isinstance(answer.get("content"), list):
        raise BadAnswerError("an answer without content", "no content")
    _text(answer)
    return answer


def _text(answer: Mapping[str, Any]) -> tuple[str, str]:
    """The text of an answer, and why it ended. What the model thought is left out."""
    told = answer.get("stop_reason")
    if not isinstance(told, str):
        raise BadAnswerError("a text without a stop_reason, so it may be incomplete", "incomplete answer")
    finished = FINISHED.get(told)
    if finished is None:
        raise BadAnswerError(f"a text that ended with {told[:40]!r}", "no text")
    parts = [part.get("text") for part in answer["content"] if isinstance(part, Mapping) and part.get("type") == "text"]
    text = "".join(part for part in parts if isinstance(part, str))
    if not text.strip() and finished == "stop":
        raise BadAnswerError("an empty text", "empty answer")
    return text, finished
