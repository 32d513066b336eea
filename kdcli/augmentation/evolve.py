"""Prompts made harder, rarer or joined, in rounds: Evol-Instruct of Xu et al. 2023 (WizardLM), arXiv:2304.12244."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Unpack

import jinja2.meta

from kdcli.api import Example
from kdcli.augmentation._asking import Asking, AskingSettings, Question, blocks, child
from kdcli.augmentation._grouped import demand
from kdcli.augmentation._making import inherited, positive
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow, content_key
from kdcli.text.prompt import ENVIRONMENT, Prompt

OPERATORS = ("evolve/constraints", "evolve/deepen", "evolve/concretize", "evolve/reasoning", "evolve/breadth")


class Evolve(Asking):
    """In each of `rounds`, one of `operators`, drawn per row, writes a new prompt from the row's newest one.

    `keep=all`: the row and each version, one after another; `last`: the newest alone. A version that failed, or says
    what the one before says, is set aside, and the next round goes on from the one before. A template that names
    `other`, as evolve/fuse does, is given another row of the same block of 256. New rows have no answer yet, and
    `meta.operator`, `meta.round` and `meta.root`, the key of the row that they began as.
    """

    extra = ("other",)
    main = "operators"

    def __init__(
        self,
        *,
        operators: Sequence[str] = OPERATORS,
        rounds: int = 1,
        keep: Literal["all", "last"] = "all",
        **settings: Unpack[AskingSettings],
    ) -> None:
        if not operators:
            raise ConfigError("augmentation: evolve.operators is empty; name at least one prompt")
        super().__init__(prompt=operators[0], **settings)
        for name in operators[1:]:
            self.load(name, "operators")
        for prompt in self.prompts:
            demand(prompt, self.where, ("prompt",))
        positive(self.where, rounds=rounds)
        self.rounds = rounds
        self.keep = keep

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        for block in blocks(examples):
            lines = [[example] for example in block]  # versions of each row
            asked = [self._begins(example) for example in block]
            for number in range(1, self.rounds + 1):
                self._round(lines, asked, number)
            for versions, state in zip(lines, asked, strict=True):
                if state is False:
                    yield versions[0]
                elif state and (self.keep == "all" or len(versions) > 1):
                    yield from versions if self.keep == "all" else versions[-1:]

    def _begins(self, example: Example) -> bool | None:
        """Whether the row is evolved; None after setting it aside."""
        try:
            if not self.applies(example):
                return False
            if not example.prompt:
                raise BadRow("lacks a field", "the row has no prompt to evolve")
        except BadRow as error:
            self.desk.aside(example, error.reason, str(error))
            return None
        return True

    def _round(self, lines: list[list[Example]], asked: Sequence[bool | None], number: int) -> None:
        names = [content_key(versions[0]) for versions in lines]
        places = [place for place, state in enumerate(asked) if state]
        questions = [self._question(lines, names, places, place, number) for place in places]
        for question, replies in self.ask(questions):
            if not replies:
                continue
            place, parents = question.thing
            record = replies[0].records[0]
            if not self.desk.rehearsal and _plain(str(record["prompt"])) in {_plain(one.prompt) for one in parents}:
                self.desk.aside(parents[0], "not evolved", "the new prompt says what the old one says", replies[0].text)
                continue
            meta = {**inherited(parents[0]), "operator": question.prompt.name, "round": number, "root": names[place]}
            lines[place].append(child(parents, record, replies[0].written, meta=meta))

    def _question(
        self, lines: Sequence[Sequence[Example]], names: Sequence[str], places: Sequence[int], place: int, number: int
    ) -> Question:
        row = lines[place][-1]
        draw = random.Random(self.desk.seed("operator", names[place], number))
        prompt = draw.choice(self.prompts)
        if not _names_other(prompt):
            return self.question(row, prompt=prompt, key=(number,), only=False, thing=(place, [row]))
        others = [one for one in places if one != place]
        if not others:
            problem = BadRow("no other row", f"{prompt.name} needs another row, and there is none beside this one")
            return Question(example=row, prompt=prompt, problem=problem)
        other = lines[draw.choice(others)][-1]
        return self.question(
            row, prompt=prompt, extra={"other": other}, key=(number,), only=False, thing=(place, [row, other])
        )


def _names_other(prompt: Prompt) -> bool:
    return "other" in jinja2.meta.find_undeclared_variables(ENVIRONMENT.parse(str(prompt.content["user"])))


def _plain(text: str | None) -> str:
    return " ".join((text or "").casefold().split())
