"""manifest.json: what a run was made of, so that it can be made again and its terms be kept."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from kdcli import __version__
from kdcli.store import atomic, paths
from kdcli.store.log import redact
from kdcli.store.status import utc_now

PACKAGES = ("torch", "transformers", "tokenizers", "deepspeed", "datasets", "safetensors", "hydra-core", "numpy")


def write(run_dir: Path, config: Mapping[str, Any], command: Sequence[str]) -> None:
    """Write run_dir/manifest.json, or add a continuation to the one that is there."""
    file = run_dir / "manifest.json"
    now = {"time": utc_now(), "command": redact(" ".join(command)), "versions": _versions(), "git": _git(paths.PACKAGE)}
    if known := read(run_dir):
        known.setdefault("continued", []).append(now)
    else:
        known = {
            **now,
            "folder": str(Path.cwd()),  # relative paths of the config are seen from here
            "seed": config["run"].get("seed"),
            "processes": config["launch"].get("processes", 1) * (config["launch"].get("nodes") or 1),
            "config_hash": xxhash.xxh3_64_hexdigest(json.dumps(config, sort_keys=True, default=str).encode()),
            "models": {
                key: _model(config[key]) for key in ("teacher", "student") if (config.get(key) or {}).get("path")
            },
            "data": _sources(config.get("data")),
            "writers": {name: _writer(node) for name, node in (config.get("writer") or {}).items() if node is not None},
            "terms": dict(config.get("terms") or {}),
        }
    atomic.write_json(file, known)


def read(run_dir: Path) -> dict[str, Any]:
    """What a manifest says, or {} where there is none."""
    try:
        return json.loads((run_dir / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def add(run_dir: Path, facts: Mapping[str, Any]) -> None:
    """Add facts to a run's manifest, in place of those of the same names."""
    atomic.write_json(run_dir / "manifest.json", read(run_dir) | dict(facts))


def licence(path: str) -> str:
    """What a model or data set says of its own licence: the package's metadata, the model card, a file beside it."""
    if path.startswith(paths.PACKAGED):
        about = metadata.metadata(path.removeprefix(paths.PACKAGED).partition("/")[0])
        stated = [about[key] for key in ("License-Expression", "License") if key in about]
        return next((text.splitlines()[0] for text in stated if text), "unknown")
    place = paths.resolve(path)
    if not place.exists():
        return "unknown"  # a hub id: the hub's page says
    card = place / "README.md"
    if card.is_file():
        lines = card.read_text("utf-8", errors="replace").splitlines()[:60]
        stated = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
        if stated:
            return stated[0]
    for folder in [place, *place.parents][:4]:
        for name in ("LICENSES.md", "LICENSE", "LICENSE.txt", "LICENSE.md"):
            if (folder / name).is_file() and (place.is_relative_to(paths.recipes()) or folder in (place, place.parent)):
                return f"see {name} in {folder.name}"
    return "unknown"


def _model(node: Mapping[str, Any]) -> dict[str, Any]:
    return {"path": node["path"], "revision": node.get("revision"), "licence": licence(node["path"])}


def _writer(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: node[key] for key in ("_target_", "model", "path", "url", "license", "terms") if key in node}


def _sources(node: Any) -> list[dict[str, Any]]:
    """Every data source of a config tree."""
    if not isinstance(node, Mapping):
        return []
    if isinstance(node.get("path"), str | list):
        each = [node["path"]] if isinstance(node["path"], str) else node["path"]
        return [{"path": path, "revision": node.get("revision"), "licence": licence(path)} for path in each]
    return [source for value in node.values() for source in _sources(value)]


def _versions() -> dict[str, str]:
    found = {"kdcli": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(folder: Path) -> str | None:
    """The commit of a checkout, with `+` where files differ from it; None outside of one."""
    if not (folder.parent / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(folder.parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
