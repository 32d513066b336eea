"""A narrower and shallower student cloned from parts of the teacher: weight subcloning, arXiv:2312.09299."""

from __future__ import annotations

from typing import ClassVar

from kdcli.student_init._narrow import Scaling
from kdcli.student_init.prune_width import PruneWidth


class Subclone(PruneWidth):
    """As `prune_width` (settings, importance, errors), with another way to make up for what has gone: each projection
    is multiplied by sqrt(d_t / d_s), d_t of the units that went into it and d_s that are left, so that the spread of
    what comes out stays that of the teacher, and norms keep their weights. The paper orders units by importance and
    takes the first; we leave them in the teacher's order, which computes the same.
    """

    option: ClassVar[str] = "subclone"
    scaling: ClassVar[Scaling] = "fan_in"
