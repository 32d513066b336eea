"""What became of the examples of a data set when they were tokenized."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Counts:
    """What became of a domain's examples. `rows` are sequences before packing."""

    examples: int = 0
    rows: int = 0
    tokens: int = 0
    teacher_tokens: int = 0  # the same unless the teacher has its own prompts or tokenizer
    supervised: int = 0  # targets
    truncated: int = 0  # rows that lost tokens at their end
    pairs: int = 0  # of a better and a worse answer
    groups: int = 0  # of two scored answers or more
    alone: int = 0  # scored answers whose group has no other
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> examples
    named: dict[str, str] = field(default_factory=dict)  # where -> reason, the first few dropped ones
    content: str = ""  # a hash of the rows' tokens, in order, and of what is known of each


@dataclass(kw_only=True)
class EncodeReport:
    """Counts per domain, and whether the tokens were on disk already. `str` is one line for the log."""

    domains: dict[str, Counts]
    cached: bool = False

    @property
    def total(self) -> Counts:
        """All domains together."""
        parts = list(self.domains.values())
        dropped = sum((Counter(part.dropped) for part in parts), Counter())
        return Counts(
            examples=sum(part.examples for part in parts),
            rows=sum(part.rows for part in parts),
            tokens=sum(part.tokens for part in parts),
            teacher_tokens=sum(part.teacher_tokens for part in parts),
            supervised=sum(part.supervised for part in parts),
            truncated=sum(part.truncated for part in parts),
            pairs=sum(part.pairs for part in parts),
            groups=sum(part.groups for part in parts),
            alone=sum(part.alone for part in parts),
            dropped=dict(dropped.most_common()),
            named={where: reason for part in parts for where, reason in part.named.items()},
        )

    def __str__(self) -> str:
        total = self.total
        lost = ", ".join(f"{count:,} {reason}" for reason, count in total.dropped.items())
        return (
            f"{total.examples:,} examples of {', '.join(self.domains)}: {total.rows:,} rows, {total.tokens:,} tokens, "
            f"{total.supervised:,} targets"
            + (f"; {total.teacher_tokens:,} tokens for the teacher" if total.teacher_tokens != total.tokens else "")
            + (f"; {total.pairs:,} pairs" if total.pairs else "")
            + (f"; {total.groups:,} groups" if total.groups else "")
            + (f"; {total.alone:,} alone in their group" if total.alone else "")
            + (f"; {total.truncated:,} rows truncated" if total.truncated else "")
            + (f"; dropped: {lost}" if lost else "")
            + (" (tokens from the cache)" if self.cached else "")
        )
