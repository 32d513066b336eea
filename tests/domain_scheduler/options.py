"""Every option of the group as its YAML file builds it, and probes to feed it with."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import yaml

from kdcli.api import DomainLoss, DomainScheduler
from kdcli.config.build import build
from kdcli.store import paths

SIZES = {"code": 300, "law": 40, "prose": 100, "web": 9}
FOLDER = paths.configs() / "domain_scheduler"
OPTIONS = sorted(file.stem for file in FOLDER.glob("*.yaml"))
GIVEN: dict[str, dict[str, Any]] = {  # what a YAML file leaves to its user
    "static": {"weights": {"code": 2, "law": 1, "prose": 3, "web": 0.5}},
    "curriculum": {
        "stages": [{"steps": 4, "domains": ["law"]}, {"steps": 2, "domains": ["code"]}, {"domains": ["web"]}]
    },
}
SOON = {  # changes that make an option act within a few updates
    "odm": {"warmup": 1},
    "ado": {"ignore": 0, "warmup": 4, "refit": 3},
    "drpruning": {"reference": "teacher"},
}
VARIANTS = [  # further settings that go other ways through the code
    ("ddk", {"first_interval": "r0"}),
    ("ddk", {"first_interval": "uniform", "smoothing": 1.0}),
    ("doremi", {"losses": "heldout"}),
    ("sheared", {"first_interval": "r0", "clip": True}),
    ("sheared", {"reference": "fitted", "interval": 10, "horizon": 60}),
    ("drpruning", {"follow": 0.5, "horizon": 2000, "reference": "teacher", "radius": 0.3}),
    ("velocitune", {"reference": "fitted", "interval": 10, "horizon": 60}),
    ("odm", {"warmup": 1, "decay": 0.9}),
    ("token_share", {"gap_power": 1.0}),
    ("token_share", {"actuator": "resample"}),
    *(
        ("composed", {"signal": signal, "update": update, "floor": "min_probability", "least": 0.01, "decay": 0.3})
        for signal in ("loss_gap", "excess_loss", "way_left", "loss", "learning_speed", "kl", "gap_velocity", "trained")
        for update in ("multiplicative", "softmax", "exp3", "chi2_dro", "average")
    ),
    ("composed", {"signal": "alignment", "floor": "none", "first_interval": "r0"}),
]
CASES = [(name, SOON.get(name, {})) for name in OPTIONS] + VARIANTS


def node(name: str, **changes: Any) -> dict[str, Any]:
    """The option's settings, with interpolations resolved."""
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    resolved = {"${run.steps}": 100_000, "${optimizer.lr}": 5e-4}
    known = {key: resolved.get(value, value) if isinstance(value, str) else value for key, value in content.items()}
    return known | GIVEN.get(name, {}) | changes


def scheduler(name: str, **changes: Any) -> Any:
    return build(node(name, **changes), DomainScheduler)


def losses(
    student: Mapping[str, float], teacher: Mapping[str, float] | None = None, **fields: Mapping[str, float]
) -> dict[str, DomainLoss]:
    """One DomainLoss per domain from one mapping per field."""
    given = fields if teacher is None else {"teacher": teacher, **fields}
    return {
        name: DomainLoss(student=loss, **{field: values[name] for field, values in given.items() if name in values})
        for name, loss in student.items()
    }


def probe(seed: int, names: Mapping[str, Any] | None = None, *, scale: float = 1.0) -> dict[str, DomainLoss]:
    """Everything measured, pseudo-random, of each domain by its name."""
    found = {}
    for name in names or SIZES:
        draw = random.Random(f"{seed} {name}")
        teacher = draw.uniform(0.5, 3.0)
        found[name] = DomainLoss(
            student=teacher + scale * draw.uniform(-0.2, 2.0),
            teacher=teacher,
            kl=scale * draw.uniform(0.01, 2.0),
            alignment=scale * draw.uniform(-1.0, 6.0),
            trained=scale * draw.uniform(0.5, 4.0),
            tokens=draw.uniform(0.01, 1.0),
        )
    return found


def run(one: Any, probes: list[dict[str, DomainLoss]], sizes: Mapping[str, int] = SIZES) -> list[dict[str, float]]:
    """Weights of the first interval and after each further probe."""
    weights = [one.initial(sizes)]
    return weights + follow(one, probes, weights[0], first=True)


def follow(
    one: Any, probes: list[dict[str, DomainLoss]], weights: Mapping[str, float], *, first: bool = False
) -> list[dict[str, float]]:
    """Weights after each probe, as the loop asks for them: `first` where a signal needs a probe, then updates."""
    said = []
    for index, found in enumerate(probes):
        begins = first and index == 0
        if begins and not one.signals - {"trained", "tokens"}:
            continue
        weights = one.first(weights, found) if begins else one.update(weights, found)
        said.append(weights)
    return said
