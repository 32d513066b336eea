"""Models and tokenizers by name: a folder, a hub id, `recipes://…` or a GGUF file. Safetensors only, and complete."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.store.content import file_hash
from kdcli.store.weights import weights_hash as weights_hash

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def load_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, with a padding token (its end token where it has none).

    Raises ConfigError if there is no such model or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    where, options = _locate(path, "tokenizer", revision, trust_remote_code)
    with _explained(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model, without its weights. Raises ConfigError if there is no such model."""
    from transformers import AutoConfig

    where, options = _locate(path, "config", revision, trust_remote_code)
    with _explained(path, "config"):
        return AutoConfig.from_pretrained(where, **options)


def real_ids(tokenizer: Any) -> int:
    """How many ids a tokenizer has; a model's padded rows beyond them are no tokens."""
    return 1 + max(tokenizer.get_vocab().values())


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    attention: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    auto: str = "AutoModelForCausalLM",
    settings: Mapping[str, Any] | None = None,
    new_head: bool = False,
    placed: Mapping[str, Any] | None = None,
) -> Any:
    """A causal language model in `dtype` on `device`, in evaluation mode; or where `placed` puts it: options of
    transformers, such as `device_map`.

    `auto` names another class of transformers, and `settings` change its config. `new_head`: what stands behind the
    backbone may be missing, and is then random, or left over, as where a classifier begins as a language model.

    Raises ConfigError if there is no such model, or if its weights are pickled, damaged, or not exactly those of
    the architecture: a layer that was not in the file would be random, and nobody would notice.
    """
    import transformers

    where, options = _locate(path, dtype, revision, trust_remote_code)
    _refuse_pickles(path, where)
    with _explained(path, "model"):
        loaded: Any = getattr(transformers, auto).from_pretrained(
            where,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below with their names
            output_loading_info=True,
            **(settings or {}),
            **(placed or {}),
            **options,
        )
    model, report = loaded
    require_complete(path, _of_backbone(model, report) if new_head else report)
    return (model if placed else model.to(device)).eval()


def require_complete(path: str, report: Mapping[str, Any]) -> None:
    """Refuse a model some of whose weights are missing, left over or of another shape.

    `report` is what transformers' `output_loading_info` gives. Raises ConfigError.
    """
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[f"{kind}_keys"])
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ConfigError(
                f"{path}: {kind} weights: {listed}; config.json and the safetensors files do not describe the same"
                " causal language model, so use a complete export (`save_pretrained`) of it"
            )


def _of_backbone(model: Any, report: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a report says of the backbone: without the head of a task, and the pooler that only such a head reads."""
    parts = {name for name, _ in model.base_model.named_children()} - {"pooler"}
    prefix = f"{model.base_model_prefix}."

    def kept(key: Any) -> bool:
        name = str(key[0] if isinstance(key, tuple) else key).removeprefix(prefix)
        return name.partition(".")[0] in parts and not name.endswith("position_ids")

    kinds = {
        kind: [str(key[0] if isinstance(key, tuple) else key) for key in keys]
        for kind, keys in report.items()
        if kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if fresh := sorted(name for name in kinds["missing_keys"] + kinds["mismatched_keys"] if not kept(name)):
        log.info("%s: begins with random weights: %s", type(model).__name__, ", ".join(fresh))
    return {kind: [name for name in names if kept(name)] for kind, names in kinds.items()}


def _locate(path: str, part: str, revision: str | None, trust: bool) -> tuple[str, dict[str, Any]]:
    """Where transformers finds `part` (tokenizer, config, or weights in a dtype) of a model, and how to look there."""
    local = paths.resolve(path) if "://" in path else Path(path).expanduser()
    if local.exists():
        if revision is not None or trust:
            raise ConfigError(f"{path} is on this disk: revision and trust_remote_code are for hub ids; remove them")
        if local.is_dir():
            return str(local), {"trust_remote_code": False}
        if local.suffix == ".gguf":
            return str(_converted(local, part)), {"trust_remote_code": False}
        raise ConfigError(f"{path} is a file; give its folder (with config.json and model.safetensors) or a .gguf file")
    if "://" in path or not HUB_ID.fullmatch(path):
        raise ConfigError(
            f"{path}: no such model; give a folder with config.json and model.safetensors, a hub id (owner/name),"
            " recipes://… or package://DISTRIBUTION/FILE.gguf"
        )
    if trust and not COMMIT.fullmatch(revision or ""):
        raise ConfigError(
            f"{path}: trust_remote_code=true runs the repository's code, so pin what you have read:"
            " revision=<the commit's 40 hexadecimal digits>"
        )
    _ask_hub(path, revision)
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust}
    return path, options | ({"code_revision": revision} if trust else {})


def _ask_hub(path: str, revision: str | None) -> None:
    """Fail within seconds where a hub id is a mistyped folder or cannot be reached; transformers retries a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
        return
    try:
        HfApi().model_info(path, revision=revision, timeout=10)
    except Exception as error:  # the hub's own errors, and those of whatever HTTP library it uses
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{path}: there is no such folder here, and the hub does not give a model of that name: {reason[:300]}"
        ) from error


def _refuse_pickles(path: str, where: str) -> None:
    """Say why a folder that holds only pickled weights is not read."""
    if not Path(where).is_dir() or any(Path(where).glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in Path(where).iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ConfigError(
            f"{path}: {pickles[0]} is a pickle, which can run code when it is read; save the model as safetensors"
            " where you trust it (`AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)`)"
        )


@contextmanager
def _explained(path: str, what: str) -> Iterator[None]:
    """Turn what transformers raises for a bad model into one ConfigError that names it."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: its {what} cannot be loaded: {reason[:400]}") from error


def _converted(file: Path, part: str) -> Path:
    """The folder with a GGUF file's tokenizer, config, or weights de-quantized to a dtype, as transformers saves them.

    Reading GGUF takes tens of seconds, so it happens once per content of the file and version of transformers.
    """
    from transformers import __version__

    folder = paths.cache() / "models" / f"{file.stem}-{file_hash(file)[:16]}-transformers-{__version__}" / part
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            log.warning("%s: converting its %s, once (about 20 s for a small model)", file.name, _named(part))
            unfinished = folder.with_name(f".tmp-{part}")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that died here; the lock is ours
            with _explained(file.name, _named(part)):
                _convert(file, part, unfinished)
            unfinished.rename(folder)
    return folder


def _convert(file: Path, part: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if part in ("tokenizer", "config"):
        kind = AutoTokenizer if part == "tokenizer" else AutoConfig
        kind.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which save_pretrained imports, warns
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=getattr(torch, part),
        quantization_config=GgufConfig(dequantize=True),  # else the weights stay blocks that nothing can train or save
        output_loading_info=True,
    )
    model, report = loaded
    require_complete(file.name, report)
    model.save_pretrained(folder)


def _named(part: str) -> str:
    return part if part in ("tokenizer", "config") else f"weights ({part})"
