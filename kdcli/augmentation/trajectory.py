"""Trajectories of an agent that thinks, acts and observes: FireAct (Chen et al. 2023), arXiv:2310.05915."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

import xxhash

from kdcli.api import Example
from kdcli.augmentation._answers import Answers
from kdcli.augmentation._asking import Asking, AskingSettings, Question, blocks
from kdcli.augmentation._environments import NAMES, Bandit, Call, ToolTask, same_text
from kdcli.augmentation._grouped import group_key
from kdcli.augmentation._react import read
from kdcli.augmentation._runs import Run, transcript
from kdcli.augmentation._talking import said
from kdcli.augmentation._tools import Python, Tool, built, cut
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow, content_key
from kdcli.text.prompt import Prompt

REHEARSED = "(a rehearsal runs no tool)"


class Trajectory(Asking):
    """Up to `max_steps` calls a trajectory, all trajectories of a block a step at a time.

    Without an `environment` the agent has `tools` and those of the row's `meta.tools` ([{name, description}], played by
    `writer_tool` with the prompt `simulator`, which sees `tool`, `input` and `transcript` (ToolAlpaca,
    arXiv:2306.05301). It writes as in ReAct, and succeeds if its final answer is `meta.answer`. Unknown tools,
    malformed actions and errors of tools are observations. A failed attempt is followed by another, up to `attempts`;
    the prompt `reflect`, which sees `transcript` and `outcome`, adds what was learned to `reflections` of the next
    (Reflexion, arXiv:2303.11366).

    environment=bandit: max_steps pulls (see Bandit); `oracle` has UCB play and asks nobody (EVOLvE, arXiv:2410.06238).

    Templates see `tools` ([{name, description}]), `reflections`, `arms` and `steps`. A prompt's `student` template is
    the student's first message; without one it sees what the writer saw, but for reflections. Rows get `meta.success`
    (if it can be known), `meta.finished`, `meta.steps`, `meta.attempts`, and the reward as their score. A rehearsal
    takes every step of every attempt, which is the most that can be asked.
    """

    extra = ("tools", "reflections", "arms", "steps", "tool", "input", "transcript", "outcome")

    def __init__(
        self,
        *,
        prompt: str = "trajectory/react",
        tools: Sequence[str] = ("calculator", "python"),
        documents: str | None = None,
        simulator: str | None = None,
        writer_tool: str | None = None,
        max_steps: int = 6,
        reflect: str | None = None,
        n: int = 1,
        keep: Literal["all", "finished", "successful"] = "finished",
        match: Literal["text", "math"] = "text",
        output: Literal["messages", "steps"] = "messages",
        environment: Literal["bandit"] | None = None,
        oracle: bool = False,
        arms: int = 5,
        rewards: Literal["bernoulli", "gaussian"] = "bernoulli",
        gap: float = 0.2,
        history: Literal["raw", "summary"] = "raw",
        seconds: float = 5.0,
        memory_mib: int = 512,
        **settings: Unpack[AskingSettings],
    ) -> None:
        super().__init__(prompt=prompt, **settings)
        self.trials, self.attempts = self.attempts, 1  # what does not parse is told to the agent, not asked for again
        self.simulator = None if simulator is None else self.load(simulator, "simulator")
        self.reflect = None if reflect is None else self.load(reflect, "reflect")
        self.tools: dict[str, Tool] = {}
        if environment is None:
            self.tools = built(tools, documents=documents, seconds=seconds, memory_mib=memory_mib)
        self._check(max_steps, n, environment, oracle, arms, gap)
        self.writer_tool = writer_tool
        self.max_steps, self.n, self.keep, self.output = max_steps, n, keep, output
        self.environment, self.oracle = environment, oracle
        self.bandit: dict[str, Any] = {"arms": arms, "rewards": rewards, "gap": gap, "history": history}
        self._math = Answers("answer", None, where=f"{self.where}.match") if match == "math" else None

    def writers(self) -> Sequence[str]:
        if self.oracle:
            return ()
        other = (self.writer_tool,) if self.writer_tool and self.simulator else ()
        return tuple(dict.fromkeys((self.writer, *other)))

    def fingerprint(self) -> str:
        parts = [super().fingerprint(), *(tool.fingerprint() for tool in self.tools.values())]
        return xxhash.xxh3_128_hexdigest(" ".join(parts).encode())

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for tool in self.tools.values():
            tool.open(self.desk)
        for block in blocks(examples, 128):
            yield from self._block(block)

    # ------------------------------------------------------------------------------------------ attempts and steps

    def _block(self, block: Sequence[Example]) -> Iterator[Example]:
        results: list[list[Example]] = [[] for _ in block]
        runs = list(self._runs(block, results))
        for attempt in range(self.trials):
            active = [run for run in runs if run.failed]
            for run in active:
                self._begin(run, attempt)
            for step in range(self.max_steps):
                self._step([run for run in active if run.open], attempt, step)
            if attempt + 1 < self.trials:
                self._reflected([run for run in active if run.failed], attempt)
            else:
                break
        for run in runs:
            results[run.place] += self._rows(run)
        for rows in results:
            yield from rows

    def _runs(self, block: Sequence[Example], results: list[list[Example]]) -> Iterator[Run]:
        for place, row in enumerate(block):
            try:
                if not self.applies(row):
                    results[place] = [row]
                    continue
                simulated = self._simulated_tools(row)
            except BadRow as error:
                self.desk.aside(row, error.reason, str(error))
                continue
            for sample in range(self.n):
                yield Run(place=place, row=row, sample=sample, simulated=simulated)

    def _simulated_tools(self, row: Example) -> Sequence[Mapping[str, Any]]:
        found = row.meta.get("tools") if self.simulator is not None else None
        if found is None:
            return ()
        if not isinstance(found, Sequence) or not all(isinstance(t, Mapping) and t.get("name") for t in found):
            raise BadRow("wrong type", "meta.tools must be a list of {name, description}")
        return found

    def read(self, prompt: Prompt, text: str, finished: str) -> list[dict[str, Any]]:
        """A step is read by the episode, which tells the agent what is wrong with it."""
        whole = finished == "stop" or (finished == "length" and self.allow_truncated)
        if prompt is self.prompt and whole and text.strip():
            return [{"response": text}]
        return super().read(prompt, text, finished)

    def _begin(self, run: Run, attempt: int) -> None:
        """A new episode, and how its prompt reads."""
        try:
            run.head = self.prompt.messages(run.row, **self._extra(run, run.reflections))
            run.shown = self._shown(run)
        except BadRow as error:
            if run.sample == 0:  # a row is set aside once
                self.desk.aside(run.row, error.reason, str(error))
            run.lost = True
            return
        run.turns = []
        run.attempts += 1
        if self.environment is None:
            gold = run.row.meta.get("answer")
            run.episode = ToolTask(self.tools, run.simulated, None if gold is None else str(gold), self._same)
        else:
            said = xxhash.xxh3_64_hexdigest("\n".join(message["content"] for message in run.head).encode())
            seed = self.desk.seed(content_key(run.row), said, "bandit", run.sample, attempt)
            free = self.prompt.parser.kind != "choice"
            run.episode = Bandit(**self.bandit, horizon=self.max_steps, seed=seed, free=free)

    def _extra(self, run: Run, reflections: Sequence[str]) -> dict[str, Any]:
        own = [{"name": tool.name, "description": tool.description} for tool in self.tools.values()]
        arms = list(NAMES[: self.bandit["arms"]])
        return {
            "tools": [*own, *run.simulated],
            "reflections": list(reflections),
            "arms": arms,
            "steps": self.max_steps,
        }

    def _step(self, runs: Sequence[Run], attempt: int, step: int) -> None:
        """One wave: every open trajectory writes its next step, acts, and observes."""
        if self.oracle:
            for run in runs:
                assert isinstance(run.episode, Bandit)
                self._act(run, run.episode.names[run.episode.ucb()], step)
            return
        answered: list[tuple[Run, str]] = []
        for question, replies in self.ask([self._question(run, attempt, step) for run in runs]):
            run: Run = question.thing
            run.lost = not replies
            if replies:
                run.replies.append(replies[0])
                answered.append((run, replies[0].text))
        if not self.desk.rehearsal:
            self._prepare([text for _, text in answered])
        for run, text in answered:
            self._act(run, text, step)
        self._play([run for run in runs if run.call is not None], attempt, step)

    def _question(self, run: Run, attempt: int, step: int) -> Question:
        assert run.episode is not None
        messages = [*run.head, *run.turns]
        if run.turns and (latest := run.episode.latest(run.turns[-1]["content"])) is not None:
            messages = [*run.head[:-1], {**run.head[-1], "content": f"{run.head[-1]['content']}\n\n{latest}"}]
        question = self.question(run.row, messages=messages, key=(run.sample, attempt, step), only=False, thing=run)
        if question.request is None:
            return question
        form = dict(run.episode.form) if run.episode.form else None
        return replace(question, request=replace(question.request, stop=tuple(run.episode.stop), form=form))

    def _prepare(self, texts: Sequence[str]) -> None:
        """Programs of one wave run side by side."""
        if isinstance(tool := self.tools.get("python"), Python):
            acts = [read(text) for text in texts]
            tool.prepare([act.input for act in acts if act.name.strip().lower() == "python"])

    def _act(self, run: Run, text: str, step: int) -> None:
        assert run.episode is not None
        if self.desk.rehearsal and not self.oracle:
            run.turns += [{"role": "assistant", "content": text}, {"role": "user", "content": REHEARSED}]
            run.call = Call(run.simulated[0], "") if run.simulated else None
            return
        kept, observed = run.episode.take(text)
        run.turns.append({"role": "assistant", "content": kept})
        if isinstance(observed, Call):
            run.call = observed
        elif observed is not None:
            self._observe(run, observed)

    def _observe(self, run: Run, text: str) -> None:
        label = "Observation: " if self.environment is None else ""
        run.turns.append({"role": "user", "content": f"{label}{text}"})

    def _play(self, runs: Sequence[Run], attempt: int, step: int) -> None:
        """The tools that a writer plays, of one wave."""
        questions = []
        for run in runs:
            assert run.call is not None
            extra = self._extra(run, ())
            extra |= {"tool": run.call.tool, "input": run.call.input, "transcript": transcript(run.turns)}
            key = ("tool", run.sample, attempt, step)
            questions.append(self.question(run.row, prompt=self.simulator, extra=extra, key=key, only=False, thing=run))
        for question, replies in self.ask(questions, self.writer_tool):
            run: Run = question.thing
            run.call, run.lost = None, not replies
            if replies and not self.desk.rehearsal:
                run.replies.append(replies[0])
                self._observe(run, cut(said(replies[0].records[0]) or replies[0].text.strip()))

    def _reflected(self, runs: Sequence[Run], attempt: int) -> None:
        """What failed attempts teach, if a prompt asks for it."""
        if self.reflect is None:
            return
        questions = []
        for run in runs:
            ended = run.episode is not None and run.episode.finished
            outcome = "The answer was wrong." if ended else f"There was no answer after {self.max_steps} steps."
            extra = {**self._extra(run, run.reflections), "transcript": transcript(run.turns), "outcome": outcome}
            key = ("reflect", run.sample, attempt)
            questions.append(self.question(run.row, prompt=self.reflect, extra=extra, key=key, only=False, thing=run))
        for question, replies in self.ask(questions):
            run: Run = question.thing
            run.lost = not replies
            if replies:
                run.replies.append(replies[0])
                run.reflections.append(replies[0].text.strip())

    def _same(self, gold: str, answer: str) -> bool:
        if self._math is None:
            return same_text(gold, answer)
        return self._math.compare(gold, answer) == "right"

    def _rows(self, run: Run) -> list[Example]:
        """What comes of a trajectory, or nothing after setting it aside."""
        episode = run.episode
        if run.lost or episode is None:
            return []
        if not self.desk.rehearsal:
            if not episode.finished and self.keep != "all":
                self.desk.aside(run.row, "unfinished", f"no final answer after {self.max_steps} steps")
                return []
            if episode.success is not True and self.keep == "successful":
                self.desk.aside(run.row, "unsuccessful", "the final answer is not meta.answer, or there is none")
                return []
        if self.output == "steps":
            return run.steps()
        return [replace(run.messages(), group=group_key(run.row) if self.n > 1 else run.row.group)]

    def _shown(self, run: Run) -> list[dict[str, str]]:
        """How the trajectory begins for the student."""
        extra = self._extra(run, ())
        own = self.prompt.for_student(run.row, **extra)
        return [{"role": "user", "content": own}] if own else self.prompt.messages(run.row, **extra)

    def _check(self, max_steps: int, n: int, environment: str | None, oracle: bool, arms: int, gap: float) -> None:
        problems = []
        if max_steps < 1 or n < 1:
            problems.append(f"{self.where}: max_steps is {max_steps} and n {n}; give 1 or more")
        if oracle and environment is None:
            problems.append(f"{self.where}.oracle: there is an oracle for environment=bandit alone")
        if not 2 <= arms <= len(NAMES):
            problems.append(f"{self.where}.arms is {arms}; give 2 to {len(NAMES)}")
        if not 0 < gap <= 1:
            problems.append(f"{self.where}.gap is {gap}; give above 0, up to 1")
        if environment is not None and "arms" not in str(self.prompt.content):
            problems.append(f"{self.where}.prompt: {self.prompt.name} does not name `arms`; take trajectory/bandit")
        if environment is None and not self.tools and self.simulator is None:
            problems.append(f"{self.where}.tools is empty; name tools, or a simulator for those of meta.tools")
        if problems:
            raise ConfigError(*problems)
