"""The environment of prompts' templates: data that sees a row's values, cannot reach Python, and comes to an end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor
from jinja2.exceptions import SecurityError

LONGEST = 1_000_000  # characters of a rendered template, and of any text within it
STEPS = 100_000  # times that the loops of one rendering go round, all together
RANGE = 1000  # numbers of a range
REFUSED = (  # what leads to other files, or calls itself
    *(jinja2.nodes.Include, jinja2.nodes.Import, jinja2.nodes.FromImport, jinja2.nodes.Extends),
    *(jinja2.nodes.Macro, jinja2.nodes.CallBlock, jinja2.nodes.Block),
)
BUDGET = "_budget"  # the variable that counts them
FILTERS = (  # none that draws at random, or pads by a number
    *("abs", "capitalize", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last", "length"),
    *("list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "select", "selectattr", "sort"),
    *("string", "sum", "title", "trim", "truncate", "unique", "upper", "wordcount"),
)
UNBOUNDED = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "join", "replace", "translate"}
)  # methods of str that make much of little; the filters of these names are bounded


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with fewer filters and bounds on loops and texts, so that a template is a function of
    its values which ends: no chance, no attributes of Python, no text above LONGEST, no more than STEPS of loops."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
        self.globals = {"range": _range, "dict": dict}
        self.filters = {name: self.filters[name] for name in FILTERS} | {
            "join": _join,
            "replace": _replace,
            "tojson": _tojson,
        }
        self.filters |= {"_counted": _counted, "_joined": _joined}

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for refused in tree.find_all(REFUSED):
            raise jinja2.TemplateSyntaxError(f"a prompt has no {type(refused).__name__.lower()}", refused.lineno)
        for loop in tree.find_all(jinja2.nodes.For):
            if loop.recursive:
                raise jinja2.TemplateSyntaxError("a prompt has no recursive loop", loop.lineno)
        return tree

    def _generate(self, source: jinja2.nodes.Template, *rest: Any, **named: Any) -> str:
        return super()._generate(_Bounded().visit(source), *rest, **named)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in UNBOUNDED:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise SecurityError("% formats no text here")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int) and hasattr(one, "__len__") and len(one) * other > LONGEST:
                    raise SecurityError("a repeated text is too long")
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= 100 and abs(left) <= 1e6):
            raise SecurityError("a power is too large")
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _size(left, right)
        return super().call_binop(context, operator, left, right)

    def finished(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """A template over values. Raises SecurityError where it passes a bound."""
        parts, size = [], 0
        for part in template.generate({**values, BUDGET: [STEPS]}):
            size += len(part)
            if size > LONGEST:
                raise SecurityError(f"the text passes {LONGEST} characters")
            parts.append(part)
        return "".join(parts)


class _Bounded(jinja2.visitor.NodeTransformer):
    """Loops count their steps, and `~` its characters."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        node = self.generic_visit(node)  # type: ignore[assignment]
        node.iter = jinja2.nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        node = self.generic_visit(node)  # type: ignore[assignment]
        parts = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        return jinja2.nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno)


@jinja2.pass_context
def _counted(context: Any, values: Iterable[Any]) -> Iterator[Any]:
    budget = context.get(BUDGET) or [STEPS]
    for value in values:
        budget[0] -= 1
        if budget[0] < 0:
            raise SecurityError(f"its loops go round more than {STEPS} times")
        yield value


def _range(*bounds: int) -> range:
    found = range(*bounds)
    if len(found) > RANGE:
        raise SecurityError(f"a range is longer than {RANGE}")
    return found


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _size(*texts)
    return "".join(texts)


@jinja2.pass_eval_context
def _join(context: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = [context.environment.getitem(one, attribute) for one in value]
    texts = [str(one) for one in value]
    _size(*texts, str(d) * min(len(texts), LONGEST // max(1, len(str(d))) + 2))
    return str(d).join(texts)


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    text = str(text)
    if len(text) + text.count(old) * len(new) > LONGEST:
        raise SecurityError("a text with its replacements is too long")
    return text.replace(old, new, count)


def _tojson(value: Any, indent: int | None = None) -> str:
    """As it stands in a prompt: without the escapes that HTML needs."""
    if isinstance(value, jinja2.Undefined):
        bool(value)  # raises what says which field is missing
    text = json.dumps(value, ensure_ascii=False, indent=None if indent is None else min(indent, 8))
    _size(text)
    return text


def _size(*texts: Any) -> None:
    if sum(map(len, texts)) > LONGEST:
        raise SecurityError(f"a text passes {LONGEST} characters")
