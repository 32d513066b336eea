"""The text protocol of ReAct: Thought, Action, Action Input, Observation, Final Answer (arXiv:2210.03629)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

STOP = ("\nObservation",)  # what the tools say is not for the writer to say
OBSERVATION = re.compile(r"^\s*Observation\s*\d*\s*:", re.MULTILINE)
ACTION = re.compile(r"^[ \t]*Action[ \t]*\d*[ \t]*:[ \t]*([^\n]*)", re.MULTILINE)
INPUT = re.compile(r"\s*^[ \t]*Action[ \t]+Input[ \t]*\d*[ \t]*:[ \t]*", re.MULTILINE)
FINAL = re.compile(r"^[ \t]*Final[ \t]+Answer[ \t]*:[ \t]*", re.MULTILINE)
NEXT = re.compile(r"^[ \t]*(?:Thought|Action|Final[ \t]+Answer)[ \t]*\d*[ \t]*:", re.MULTILINE)
BRACKETS = re.compile(r"(\w+)\[(.*)\]\s*$", re.DOTALL)  # Action: search[the capital of France]
CLOSING = ("finish", "final answer", "answer")  # names of an action that ends
MALFORMED = (
    "Error: neither an action nor an answer was found. Write `Action: TOOL` and on the next line `Action Input: …`, or "
    "`Final Answer: …`"
)


class Act(NamedTuple):
    """What a writer does in one step."""

    text: str  # what counts of the step: up to its first action or answer
    name: str = ""  # of the tool; empty without an action
    input: str = ""
    answer: str | None = None  # the final one


def read(text: str) -> Act:
    """The first action or final answer of a step; neither, where it keeps to no part of the protocol."""
    made_up = OBSERVATION.search(text)
    text = (text[: made_up.start()] if made_up else text).strip()
    action, final = ACTION.search(text), FINAL.search(text)
    if final and (not action or final.start() < action.start()):
        end = NEXT.search(text, final.end())
        said = text[final.end() : end.start() if end else len(text)].strip()
        return Act(text[: end.start() if end else len(text)].strip(), answer=said) if said else Act(text)
    if not action:
        return Act(text)
    name, end = action[1].strip().strip("`*\"' "), action.end()
    if inside := BRACKETS.match(name):
        name, given = inside[1], inside[2]
    elif found := INPUT.match(text, action.end()):
        following = NEXT.search(text, found.end())
        end = following.start() if following else len(text)
        given = text[found.end() : end]
    else:
        given = ""
    kept = text[:end].strip()
    if name.casefold() in CLOSING:
        return Act(kept, answer=given.strip()) if given.strip() else Act(kept)
    return Act(kept, name=name, input=given.strip()) if name else Act(kept)


def form(names: Sequence[str]) -> dict[str, Any]:
    """The pattern of one step, for writers that can be held to it."""
    tools = "|".join(re.escape(name) for name in names)
    call = rf"Action: ({tools})\nAction Input: [^\s][^\n]*(\n[^\n]+)*"
    answer = r"Final Answer: [^\s][^\n]*"
    return {"regex": rf"Thought: [^\s][^\n]*\n({call}|{answer})" if names else answer}
