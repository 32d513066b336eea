"""Who asks the writers: threads for each, equal requests asked once, answers stored before anyone sees them."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from json import dumps
from typing import Any

from kdcli.api import Answer, Request, Writer
from kdcli.errors import KDError
from kdcli.pipeline.budget import Meter
from kdcli.store.fault import fault
from kdcli.store.responses import Account, Responses, Spent, dated, request_key
from kdcli.store.terms import terms_of

RECENT = 4096  # more than come back between a look into the store and its use
TICK = 0.25  # seconds between looks at what else may have happened while one waits


class Call:
    """A request on its way: `answer` is set once it is stored. `wanted`: by how many; nobody makes it for none."""

    __slots__ = ("answer", "key", "made", "request", "wanted")

    def __init__(self, key: bytes, request: Request) -> None:
        self.key = key
        self.request = request
        self.answer: Answer | None = None
        self.made = False
        self.wanted = 1


class Office:
    """The writers of a run, by name, with one store and one budget. Its methods are for the run's own thread."""

    def __init__(self, writers: Mapping[str, Writer], store: Responses, meter: Meter) -> None:
        self.store = store
        self.meter = meter
        self.staff = {name: Staff(name, writer, self) for name, writer in writers.items()}
        self.calls: dict[bytes, Call] = {}  # in flight
        self._recent: OrderedDict[bytes, Call] = OrderedDict()  # answered not long ago
        self.changed = threading.Condition()
        self.numbers = itertools.count(1)  # of calls of `write` that came back
        self._error: BaseException | None = None

    def find(self, writer: str, requests: Sequence[Request]) -> list[Call]:
        """A call for each of some tens of requests, answered where it is stored; `current` says which to make."""
        identity = self.staff[writer].asked.identity
        calls = [Call(request_key(identity, request), request) for request in requests]
        stored = self.store.find_all([call.key for call in calls])
        for call in calls:
            call.answer = stored.get(call.key)
        return calls

    def current(self, call: Call) -> Call:
        """The call of this request that is on its way, or came back since `find` looked; else the call itself."""
        if call.answer is not None:
            return call
        with self.changed:
            other = self.calls.get(call.key)
            if other is None:
                return self._recent.get(call.key, call)
            other.wanted += 1
            return other

    def leave(self, calls: Iterable[Call]) -> None:
        """Nobody waits for these any more: those that were not begun never are."""
        with self.changed:
            for call in calls:
                call.wanted -= 1

    def left(self, calls: Sequence[Call]) -> bool:
        """Whether nobody wants any of them; they are forgotten then. From a writer's thread."""
        with self.changed:
            if any(call.wanted > 0 for call in calls):
                return False
            for call in calls:
                self.calls.pop(call.key, None)
            return True

    def is_new(self, call: Call) -> bool:
        """Whether nobody has made it yet."""
        return not call.made and call.answer is None

    def make(self, writer: str, calls: Sequence[Call], account: Account) -> None:
        """Hand new calls to the writer's threads, to be made together."""
        self.staff[writer].take(calls, account)

    def wait(self, call: Call, tick: Callable[[], None]) -> Answer:
        """The stored answer. Raises what ended the office's work; `tick` is called now and then, and may raise too."""
        while call.answer is None:
            with self.changed:
                if self._error is None and call.answer is None:
                    self.changed.wait(TICK)
            self.check()
            if call.answer is None:
                tick()
        return call.answer

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def stop(self, error: BaseException) -> None:
        """No call begins any more; who waits is told why. From any thread."""
        with self.changed:
            self._error = self._error or error
            self.changed.notify_all()

    @property
    def stopped(self) -> bool:
        return self._error is not None

    def done(self, calls: Sequence[Call], answers: Sequence[Answer]) -> None:
        """Answers are stored. From the store's thread."""
        with self.changed:
            for call, answer in zip(calls, answers, strict=True):
                call.answer = answer
                self.calls.pop(call.key, None)
                if not answer.failed:
                    self._recent[call.key] = call
            while len(self._recent) > RECENT:
                self._recent.popitem(last=False)
            self.changed.notify_all()

    def settle(self, patience: float) -> None:
        """Begin nothing more, and wait up to `patience` seconds for the calls under way; they are paid for."""
        self.stop(KDError("the run has ended"))
        end = time.monotonic() + patience
        for staff in self.staff.values():
            staff.dismiss(max(0.0, end - time.monotonic()))


class Asked:
    """What is known of a writer without asking it."""

    def __init__(self, name: str, writer: Writer) -> None:
        self.name = name
        self.writer = writer
        self._terms: dict[str, str] = {}

    @cached_property
    def identity(self) -> str:
        """A hash of what the writer's answers depend on."""
        return blake2b(dumps(self.writer.identity(), sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

    def terms(self, model: str) -> str:
        """The id of the row of the table of terms that holds for an answer of `model`, as the server names it."""
        if model not in self._terms:
            one = self.writer
            self._terms[model] = terms_of(one.license, one.endpoint, model or one.model, one.terms).id
        return self._terms[model]

    def cost(self, answer: Answer) -> float:
        """In the currency of the writer's prices."""
        prompt, completion = self.writer.price_prompt, self.writer.price_completion
        return (answer.prompt_tokens * prompt + answer.completion_tokens * completion) / 1e6

    def provenance(self, step: str, answer: Answer, template: str) -> dict[str, Any]:
        """One entry of `meta.written`."""
        return {
            "step": step,
            "by": self.name,
            "teacher": answer.model or self.writer.model,
            "endpoint": self.writer.endpoint,
            "date": answer.date,
            "template": template,
            "terms": self.terms(answer.model),
        }


class Staff:
    """The threads that ask one writer."""

    def __init__(self, name: str, writer: Writer, office: Office) -> None:
        self.name = name
        self.writer = writer
        self.office = office
        self.asked = Asked(name, writer)
        self._jobs: queue.SimpleQueue[tuple[Sequence[Call], Account] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def take(self, calls: Sequence[Call], account: Account) -> None:
        for call in calls:
            call.made = True
            self.office.calls[call.key] = call
        if len(self._threads) < self.writer.concurrency:
            thread = threading.Thread(target=self._work, name=f"kdcli-{self.name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put((calls, account))

    def dismiss(self, patience: float) -> None:
        end = time.monotonic() + patience
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._threads.clear()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self.office.stopped and not self.office.left(job[0]):
                self._ask(*job)

    def _ask(self, calls: Sequence[Call], account: Account) -> None:
        """One call of the writer's `write`, and its answers to the store."""
        office, number = self.office, len(calls)
        try:
            office.meter.start(number)
        except KDError as error:
            return office.stop(error)
        spent = Spent()
        try:
            answers = [_usable(one) for one in self.writer.write([call.request for call in calls])]
            if len(answers) != number:
                raise KDError(f"writer.{self.name}: {len(answers)} answers to {number} requests; this is its bug")
            fault("augment.answer", step=next(office.numbers))
            spent = Spent(
                calls=number,
                failed=sum(bool(one.failed) for one in answers),
                prompt_tokens=sum(one.prompt_tokens for one in answers),
                completion_tokens=sum(one.completion_tokens for one in answers),
                cost=sum(self.asked.cost(one) for one in answers),
            )
            office.store.keep(
                [call.key for call in calls],
                answers,
                account=account,
                spent=spent,
                done=lambda stored: office.done(calls, stored),
                failed=office.stop,
            )
        except BaseException as error:  # this thread's end would leave the run waiting
            office.stop(error)
        finally:
            office.meter.end(number, spent)


def _usable(answer: Answer) -> Answer:
    """Dated; without half characters, which no file takes; and failed where there is no text at all."""
    if answer.failed:
        return answer
    if not answer.texts or len(answer.finished) != len(answer.texts):
        return replace(answer, texts=(), finished=(), failed="no answer", detail="the server sent no text")
    if any(_halved(text) for text in answer.texts):
        answer = replace(answer, texts=[text.encode("utf-8", "replace").decode() for text in answer.texts])
    return dated(answer)


def _halved(text: Any) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
