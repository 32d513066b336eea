"""Tools of an agent: arithmetic, Python in the sandbox, search in a file of documents and look-up in what was found.

The interface is that of ReAct (Yao et al. 2023, arXiv:2210.03629): text in, text out. What goes wrong is told to the
agent.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

import xxhash

from kdcli.api import Desk
from kdcli.augmentation._programs import program_in, run_all
from kdcli.errors import ConfigError
from kdcli.store import paths

SHOWN = 1500  # characters of an observation; longer ones are cut, and say so
State = MutableMapping[str, Any]  # what tools remember within one attempt


class ToolError(Exception):
    """What an agent is told when a call went wrong."""


class Tool(ABC):
    """Named in an action, given its input as text."""

    name: ClassVar[str]
    description: ClassVar[str]

    def open(self, desk: Desk) -> None:
        """Called once, before the first row."""
        self.desk = desk

    def fingerprint(self) -> str:
        """A hash of the files it reads."""
        return ""

    def prepare(self, texts: Sequence[str]) -> None:
        """Called with all inputs of a turn before they are called one by one, for what is faster together."""

    @abstractmethod
    def __call__(self, text: str, state: State) -> str:
        """The observation. Raises ToolError."""


class Calculator(Tool):
    """Arithmetic read from the syntax tree, with bounds on size: nothing is evaluated as Python."""

    name = "calculator"
    description = "computes an arithmetic expression, such as (3 + 4) * sqrt(2) / 7"

    def __call__(self, text: str, state: State) -> str:
        del state
        source = text.strip().strip("`").rstrip("=").strip().replace("^", "**")
        if not re.search(r"[a-z]", source):  # 1,000 is a number, and min(1,000) is none
            source = re.sub(r"(?<=\d),(?=\d{3}\b)", "", source)
        if len(source) > 500:
            raise ToolError("the expression is too long")
        try:
            value = _value(ast.parse(source, mode="eval").body)
            return _shown(value)
        except (SyntaxError, RecursionError, MemoryError):
            raise ToolError("this is no arithmetic expression") from None
        except ZeroDivisionError:
            raise ToolError("division by zero") from None
        except (ArithmeticError, ValueError, TypeError) as error:
            raise ToolError(f"{error}") from None


class Python(Tool):
    """A program in the sandbox; it runs once, and what it printed is remembered over crashes and runs."""

    name = "python"
    description = "runs a Python program and returns what it prints"

    def __init__(self, *, seconds: float = 5.0, memory_mib: int = 512) -> None:
        self.limits = {"seconds": seconds, "memory_mib": memory_mib}

    def prepare(self, texts: Sequence[str]) -> None:
        run_all(self.desk, [(source, "") for text in texts if (source := program_in(text))], self.limits)

    def __call__(self, text: str, state: State) -> str:
        del state
        source = program_in(text)
        if source is None:
            raise ToolError("there is no program in Python")
        ran = run_all(self.desk, [(source, "")], self.limits)[0]
        if ran.ok:
            return ran.output.strip() or "(it printed nothing)"
        last = ran.error.strip().splitlines()[-1:]
        raise ToolError("; ".join([ran.why, *last]))


class Search(Tool):
    """BM25 over a file of documents: text lines, or JSON lines with `text` and perhaps `title`."""

    name = "search"
    description = "finds the passages that fit some key words best"

    def __init__(self, documents: str, *, k: int = 2) -> None:
        self.path = paths.resolve(documents)
        self.k = k
        self._index: Any = None

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.path.read_bytes())

    def __call__(self, text: str, state: State) -> str:
        found = self.find(text)
        if not found:
            raise ToolError("nothing was found; use other words")
        state["pages"] = found
        state.pop("lookup", None)
        return "\n".join(f"[{i}] {page}" for i, page in enumerate(found, start=1))

    def find(self, text: str) -> list[str]:
        """The best `k` documents that share a word with `text`, the best first; equal scores in the file's order."""
        import numpy

        if self._index is None:
            self._pages, self._index = _indexed(self.path)
        words = _words(text)
        known = [word for word in words if word in self._index.vocab_dict]
        if not known:
            return []
        scores = numpy.asarray(self._index.get_scores(known))
        best = numpy.argsort(-scores, kind="stable")[: self.k]
        return [self._pages[i] for i in best if scores[i] > 0]


class Lookup(Tool):
    """The next sentence with a word, in what the last search found."""

    name = "lookup"
    description = "gives the next sentence that has some words, in the passages that the last search found"

    def __call__(self, text: str, state: State) -> str:
        pages = state.get("pages")
        if not pages:
            raise ToolError("search first: there is nothing to look into")
        words = text.strip().lower()
        if not words:
            raise ToolError("name the words to look for")
        sentences = [s for page in pages for s in re.split(r"(?<=[.!?])\s+", page) if words in s.lower()]
        place = state["lookup"][1] + 1 if state.get("lookup", ("",))[0] == words else 0
        state["lookup"] = (words, place)
        if place >= len(sentences):
            raise ToolError("there is no more" if sentences else "no sentence has these words")
        return f"({place + 1} of {len(sentences)}) {sentences[place]}"


TOOLS = ("calculator", "python", "search", "lookup")


def built(names: Sequence[str], *, documents: str | None, seconds: float, memory_mib: int) -> dict[str, Tool]:
    """Tools by name, in order. Raises ConfigError for an unknown one, or a search without documents."""
    made: dict[str, Callable[[], Tool]] = {
        "calculator": Calculator,
        "python": lambda: Python(seconds=seconds, memory_mib=memory_mib),
        "search": lambda: Search(documents or ""),
        "lookup": Lookup,
    }
    if unknown := [name for name in names if name not in made]:
        raise ConfigError(f"trajectory.tools: there is no tool {unknown[0]}; choose of {', '.join(made)}")
    if "search" in names and not documents:
        raise ConfigError("trajectory.tools: search needs trajectory.documents, a file of documents; or leave it out")
    if "lookup" in names and "search" not in names:
        raise ConfigError("trajectory.tools: lookup needs search beside it")
    return {name: made[name]() for name in names}


def called(tools: Mapping[str, Tool], name: str, text: str, state: State, names: Sequence[str] = ()) -> str:
    """What an agent sees of a call: the observation, or what was wrong with it. `names`: of all tools there are."""
    tool = tools.get(name.strip().lower())
    if tool is None:
        return f"Error: there is no tool {name.strip()[:40]!r}; the tools are {', '.join(names or tools)}"
    try:
        return cut(tool(text, state))
    except ToolError as error:
        return f"Error: {cut(str(error))}"


def cut(text: str) -> str:
    """An observation of a bounded length."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} … ({len(text) - SHOWN} more characters)"


# ---------------------------------------------------------------------------------------------- arithmetic

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log10", "log2", "sin", "cos", "tan", "floor", "ceil")},
    "log": math.log,
    "ln": math.log,
    "abs": abs,
    "round": lambda value, digits=0: round(value, max(-15, min(int(digits), 15))) if digits else round(value),
    "min": min,
    "max": max,
}
CONSTANTS = {"pi": math.pi, "e": math.e}
BITS = 4096  # of a whole number; more would take long and say nothing


def _value(node: ast.expr) -> float | int:
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as value):
            return _bounded(value)
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _bounded(OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return _bounded(FUNCTIONS[name](*map(_value, arguments)))
    raise ToolError("only numbers, + - * / // % **, brackets and a few functions can be computed")


def _power(base: float | int, exponent: float | int) -> float | int:
    if isinstance(base, int) and isinstance(exponent, int):
        if exponent >= 0 and base.bit_length() * exponent > BITS:
            raise ToolError("the number is too large")
    elif base < 0 and exponent != int(exponent):
        raise ToolError("a root of a negative number is no real number")
    return _bounded(base**exponent)


def _bounded(value: Any) -> float | int:
    if isinstance(value, int) and value.bit_length() > BITS:
        raise ToolError("the number is too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError("the number is too large")
    return value


def _shown(value: float | int) -> str:
    """Up to 12 digits, so that 0.1 + 0.2 reads 0.3."""
    return str(value) if isinstance(value, int) else f"{value:.12g}"


# ---------------------------------------------------------------------------------------------- documents


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _indexed(path: Any) -> tuple[list[str], Any]:
    """The documents of a file, and a BM25 index of them."""
    try:
        import bm25s
    except ImportError:
        raise ConfigError('trajectory.tools: search needs bm25s; pip install "kdcli[augment]"') from None
    pages = _pages(path)
    if not pages:
        raise ConfigError(f"trajectory.documents: {path} has no documents")
    index = bm25s.BM25()
    index.index([_words(page) or ["_"] for page in pages], show_progress=False)
    return pages, index


def _pages(path: Any) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trajectory.documents: {path} cannot be read ({error})") from None
    if path.suffix not in (".jsonl", ".json"):
        return [line.strip() for line in lines if line.strip()]
    pages = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            title = str(row.get("title") or "").strip()
            pages.append(f"{title}: {row['text']}" if title else str(row["text"]))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ConfigError(f"trajectory.documents: {path}:{number} is no JSON object with `text`") from None
    return pages
