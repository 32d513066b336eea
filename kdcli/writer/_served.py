"""What writers behind a server share: who is asked and at what price, and failures of one request or of all."""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypedDict, TypeVar

from kdcli.api import Answer, Request, Writer
from kdcli.errors import ConfigError
from kdcli.store.http import Client, RefusedError, UnansweredError

log = logging.getLogger(__name__)

T = TypeVar("T")

TOO_LONG = (  # words by which servers say that prompt and answer do not fit into the model's context
    *("context length", "context_length", "context window", "context size", "maximum context", "max_model_len"),
    *("too long", "too many tokens", "maximum input length", "input length", "reduce the length", "maximum number of"),
)
FORM_WORDS = (  # by which they say that they do not know the field that holds an answer to a form
    *("response_format", "json_schema", "structured", "guided", "schema", "grammar", "regex", "output_config"),
)
BYTES_PER_TOKEN = 64  # of an answer, far more than text needs: longer answers are cut off as nonsense


class Pricing(TypedDict, total=False):
    """Settings of every writer behind a server; constructors hand them on as `**settings: Unpack[...]`."""

    price_prompt: float
    price_completion: float
    license: str | None
    terms: str | None


class Served(Writer):
    """Asks through `client`. The first refusal that holds for all requests ends the asking: later ones raise it again
    without a word to the server."""

    client: Client

    def __init__(
        self,
        client: Client,
        *,
        model: str,
        temperature: float | None,
        top_p: float | None,
        max_tokens: int,
        extra_body: Mapping[str, Any] | None,
        price_prompt: float = 0.0,
        price_completion: float = 0.0,
        license: str | None = None,
        terms: str | None = None,
    ) -> None:
        for name, value in (("price_prompt", price_prompt), ("price_completion", price_completion)):
            if not value >= 0:
                raise ConfigError(f"{client.where}.{name}: {value} is no price; set what 1e6 tokens cost, or 0")
        if max_tokens < 1:
            raise ConfigError(f"writer.max_tokens: {max_tokens} leave no room for an answer; set at least 1")
        self.client = client
        self.served_model = model
        self.temperature, self.top_p, self.max_tokens = temperature, top_p, max_tokens
        self.extra_body = dict(extra_body or {})
        self.concurrency = client.concurrency
        self.price_prompt, self.price_completion = price_prompt, price_completion
        self.license, self.terms = license, terms
        self._refused: ConfigError | None = None
        self._given_up = threading.Event()
        self._unknown: set[str] = set()  # fields for forms that the server does not know
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return self.client.server.name

    @property
    def model(self) -> str:
        return self.served_model

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._answer(request) for request in requests]

    def close(self) -> None:
        self._given_up.set()
        self.client.close()

    @abstractmethod
    def _written(self, request: Request) -> Answer:
        """The answer to one request. Raises what `Client.ask` raises."""

    def _answer(self, request: Request) -> Answer:
        if self._refused is not None:
            raise self._refused
        try:
            return self._written(request)
        except RefusedError as error:
            if error.status not in (401, 402, 403, 404) and error.status >= 400:
                return self._failed(error)
            self._refused = error
        except ConfigError as error:
            self._refused = error
        except UnansweredError as error:
            return Answer(failed=error.short, detail=error.last, model=self.model, date=today())
        self._given_up.set()
        raise self._refused

    def _held(self, field: str, ask: Callable[[str], T], *, given_up: bool) -> T:
        """What `ask` gets with the `field` that holds answers to a form (empty: none), or, where the server says that
        it does not know the field and it may be `given_up`, without it, now and from then on."""
        field = "" if given_up and field in self._unknown else field
        try:
            return ask(field)
        except RefusedError as error:
            unknown = error.status in (400, 422) and any(word in error.said.lower() for word in FORM_WORDS)
            if not field or not given_up or not unknown:
                raise
            with self._lock:
                if field not in self._unknown:
                    log.warning(
                        "writer: %s does not take %s (HTTP %d); answers are not held to a form from here on",
                        *(self.client.server.name, field, error.status),
                    )
                self._unknown.add(field)
            return ask("")

    def _failed(self, error: RefusedError) -> Answer:
        """A refusal of this request alone."""
        said = error.said.lower()
        if error.status in (400, 413, 422) and any(words in said for words in TOO_LONG):
            short = "context too long"
        else:
            short = f"HTTP {error.status}"
        return Answer(failed=short, detail=str(error), model=self.model, date=today())


def limit(max_tokens: int, n: int) -> int:
    """Bytes that an answer of n texts may have."""
    return (1 << 20) + BYTES_PER_TOKEN * max_tokens * n


def closed(schema: Any) -> bool:
    """Whether every object in a schema requires all its properties and allows no other, as OpenAI's strict mode
    asks."""
    if isinstance(schema, Mapping):
        if isinstance(properties := schema.get("properties"), Mapping) and (
            schema.get("additionalProperties") is not False or set(schema.get("required", ())) != set(properties)
        ):
            return False
        return all(closed(value) for value in schema.values())
    return not isinstance(schema, list) or all(closed(value) for value in schema)


def tokens(texts: Sequence[str]) -> int:
    """An estimate of their number, where a server counts none: one per 4 bytes."""
    return sum(-(-len(text.encode("utf-8", "replace")) // 4) for text in texts)


def counted(usage: Any, name: str, estimate: Callable[[], int]) -> int:
    """A number of tokens that a server tells, or the estimate."""
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else estimate()


def today() -> str:
    return datetime.now(UTC).date().isoformat()
