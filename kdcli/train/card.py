"""The model card of an exported student: where it comes from, what applies to it, and what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from kdcli import __version__
from kdcli.store import metrics

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LICENCE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")  # as model cards name licences: apache-2.0
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModel": "feature-extraction",
}
PACKAGES = ("torch", "transformers", "deepspeed", "peft")
TEACHERS = "teacher_"  # a metric of the teacher begins so, after its domain

TEXT = """\
# {name}

{what} distilled with [kdcli](https://pypi.org/project/kdcli).

| | |
|---|---|
{facts}

{numbers}## Licence and terms

{terms}

{data}## Use

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```

## How it was made

```
{command}
```

{versions}
"""


def text(
    run_dir: Path, config: Mapping[str, Any], path: Path, auto: str = "AutoModelForCausalLM", step: int | None = None
) -> str:
    """The card of the student of `run_dir`, as it was at `step` (by default its last), for a folder at `path`."""
    lines = [line for line in metrics.read(run_dir) if step is None or line.get("step", 0) <= step]
    manifest = _manifest(run_dir)
    licences = _licences(manifest)
    return "---\n{}---\n{}".format(
        yaml.safe_dump(_front(config, auto, licences), sort_keys=False, allow_unicode=True),
        TEXT.format(
            name=(config.get("run") or {}).get("name", "student"),
            what="A classifier" if "Classification" in auto else "A language model",
            facts="\n".join(f"| {key} | {value} |" for key, value in _facts(config, lines, step).items()),
            numbers=_numbers(lines),
            terms=_terms(licences),
            data=_data_and_terms(manifest),
            auto=auto,
            path=path,
            command=manifest.get("command") or "kdcli distill",
            versions=_versions(manifest),
        ),
    )


def _front(config: Mapping[str, Any], auto: str, licences: Mapping[str, str]) -> dict[str, Any]:
    """The front matter that model hubs read, and two keys of ours: teacher and terms."""
    teacher, student = (config.get(name) or {} for name in ("teacher", "student"))
    made = not _target(config.get("student_init")).endswith("Pretrained")
    origin = student.get("path") or (teacher.get("path") if made and "FromConfig" not in _init(config) else None)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": PIPELINES.get(auto, "text-generation")}
    front["license"] = _one_licence(licences)
    if origin and HUB_ID.fullmatch(str(origin)) and not Path(origin).exists():
        front["base_model"] = [origin]
    if data := [path for path in _data(config) if HUB_ID.fullmatch(path) and not Path(path).exists()]:
        front["datasets"] = data
    front["tags"] = ["distillation", "kdcli", *(["lora"] if _target(student) == "LoRA" else [])]
    if teacher.get("path"):
        front["teacher"] = str(teacher["path"])
    front["terms"] = "; ".join(f"{what}: {licence}" for what, licence in licences.items()) or "unknown"
    return front


def _facts(config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], step: int | None) -> dict[str, str]:
    last = lines[-1] if lines else {}
    objectives = (config.get("objective") or {}).items()
    return {
        "teacher": _described(config, "teacher"),
        "student began as": ", ".join(
            filter(None, [_init(config), str((config.get("student") or {}).get("path") or "")])
        ),
        "student": _target(config.get("student")),
        "data": ", ".join(_data(config)) or _target(config.get("data")),
        "objectives": ", ".join(f"{name} ({_target(node)})" for name, node in objectives if node),
        "optimizer steps": str(last.get("step", 0) if step is None else step),
        "supervised tokens": f"{last.get('tokens') or 0:,.0f}",
    }


def _numbers(lines: Sequence[Mapping[str, Any]]) -> str:
    """Held-out metrics before and after, and the teacher's where it was measured too."""
    told = [line for line in lines if any(key.startswith("eval/") and line[key] is not None for key in line)]
    if not told:
        return ""
    first, last = told[0], told[-1]
    rows = [
        "## Results on held-out data",
        "",
        f"Before is step {first.get('step', 0)}, after is step {last.get('step', 0)}.",
        "",
        "| metric | before | after | teacher |",
        "|---|---|---|---|",
    ]
    for key in last:
        head, _, measure = key.rpartition("/")
        if key.startswith("eval/") and last[key] is not None and not measure.startswith(TEACHERS):
            values = [first.get(key) if first is not last else None, last[key], last.get(f"{head}/{TEACHERS}{measure}")]
            rows.append(f"| {key.removeprefix('eval/')} | " + " | ".join(map(_number, values)) + " |")
    return "\n".join([*rows, "", ""])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value == int(value) and abs(value) >= 100 else f"{value:.4g}"


def _manifest(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _licences(manifest: Mapping[str, Any]) -> dict[str, str]:
    """`teacher PATH`, `student PATH`, `data PATH` -> what each says of its licence."""
    models = {f"{role} {one['path']}": one.get("licence") for role, one in (manifest.get("models") or {}).items()}
    data = {f"data {one['path']}": one.get("licence") for one in manifest.get("data") or ()}
    return {what: str(licence or "unknown") for what, licence in (models | data).items()}


def _one_licence(licences: Mapping[str, str]) -> str:
    """The licence of the models where all name the same; `other` where they differ, `unknown` where one is not known.
    The owner of the student may know better, and should."""
    named = {licence for what, licence in licences.items() if not what.startswith("data ")}
    if not named or "unknown" in named:
        return "unknown"
    [*one] = named
    return one[0].lower() if len(one) == 1 and LICENCE_ID.fullmatch(one[0]) else "other"


def _data_and_terms(manifest: Mapping[str, Any]) -> str:
    """Where its rows come from and who wrote them, as the rows say; what the terms of these ask for."""
    made = manifest.get("augmentation") or manifest.get("provenance") or {}
    if not made.get("written") and not made.get("licences"):
        return ""
    writers = [
        f"- {entry['rows']:,} rows by {entry['teacher'] or 'an unknown model'} at "
        f"{entry['endpoint'] or 'an unknown place'} (step {entry['step']}, terms {entry.get('terms') or 'unknown'})"
        for entry in made.get("written") or ()
    ]
    rules = dict.fromkeys(
        rule
        for entry in made.get("written") or ()
        for rule in ((entry.get("terms_row") or {}).get(key) for key in ("attribution", "naming"))
        if rule
    )
    declared = (manifest.get("terms") or {}).get("use")
    lines = [
        "## Data and terms",
        "",
        f"{made.get('rows', 0):,} rows. Sources: {_counts(made.get('sources'))}. "
        f"Licences: {_counts(made.get('licences'))}.",
        "" if writers else None,
        *writers,
        "" if rules else None,
        *(f"- asked for by the terms: {rule}" for rule in rules),
        "",
        f"Declared use: {declared or 'none'}. This is a record of what was found, and no legal advice.",
        "",
    ]
    return "\n".join([line for line in lines if line is not None] + [""])


def _counts(counts: Mapping[str, int] | None) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in (counts or {}).items()) or "unstated"


def _terms(licences: Mapping[str, str]) -> str:
    rows = [f"- {what}: {licence}" for what, licence in licences.items()]
    intro = "What the teacher, the model it began as and the data allow applies to this model too"
    return "\n".join([f"{intro}:", "", *rows]) if rows else f"{intro}; their licences are not known here."


def _versions(manifest: Mapping[str, Any]) -> str:
    versions = dict(manifest.get("versions") or {})
    for package in PACKAGES:
        if package not in versions:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
    shown = ["kdcli " + str(versions.get("kdcli", __version__))]
    shown += [f"{package} {versions[package]}" for package in PACKAGES if package in versions]
    commit = f", commit {manifest['git']}" if manifest.get("git") else ""
    return ", ".join(shown) + commit


def _described(config: Mapping[str, Any], section: str) -> str:
    node = config.get(section) or {}
    return ": ".join(filter(None, [_target(node), str(node.get("path") or "")]))


def _init(config: Mapping[str, Any]) -> str:
    return _target(config.get("student_init"))


def _data(node: Any) -> list[str]:
    """The paths of a config's training data."""
    if isinstance(node, Mapping) and "data" in node and "objective" in node:
        node = node["data"]
    if not isinstance(node, Mapping):
        return []
    path = node.get("path")
    if path is not None:
        return [str(one) for one in ([path] if isinstance(path, str) else path)]
    return [found for value in node.values() for found in _data(value)]


def _target(node: Any) -> str:
    return str((node or {}).get("_target_", "")).rpartition(".")[2]
