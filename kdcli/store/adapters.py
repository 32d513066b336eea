"""Low-rank adapters in a transformers model, through peft: LoRA (arXiv:2106.09685), DoRA (arXiv:2402.09353), rsLoRA
(arXiv:2312.03732)."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from kdcli.errors import ConfigError
from kdcli.store.shards import ADAPTER

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]
INITS: dict[str, Any] = {"kaiming": True}  # what peft calls them, where it has another name
CHANGES_BASE = ("pissa", "olora")  # take what the adapter begins with out of the frozen weight
LINEAR = ("Linear", "Conv1D", "Linear4bit")  # Conv1D is GPT-2's linear layer, stored transposed
ALL = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Every target's weight W stays, and W + scaling * B A learns, A [rank, in] and B [out, rank].

    scaling = alpha / rank, or alpha / sqrt(rank) with `rslora`. `dora` learns the length of each output's weights apart
    from their direction. `modules_to_save` learn whole, beside the adapter.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Sequence[str] | str = ALL
    dora: bool = False
    rslora: bool = False
    modules_to_save: Sequence[str] = ()
    init: Init = "kaiming"
    seed: int = 0

    def check(self, model: Any) -> None:
        """Raises ConfigError for modules that `model` (which may be on the meta device) does not have, or that an
        adapter cannot sit on."""
        modules = dict(model.named_modules())
        head = model.get_output_embeddings()
        linear = [name for name, one in modules.items() if _is_linear(one) and one is not head]
        kind = type(model).__name__
        for target in _listed(self.target_modules):
            found = [name for name in modules if _named(name, target, self.target_modules)]
            if not found:
                raise ConfigError(f"student.target_modules: {kind} has no module {target}; {_near(target, linear)}")
            for name in found:
                if name not in linear:
                    other = "put it into student.modules_to_save" if modules[name] is head else _near(target, linear)
                    what = "the head" if modules[name] is head else f"a {type(modules[name]).__name__}"
                    raise ConfigError(
                        f"student.target_modules: {name} is {what}, and LoRA sits on linear layers; {other}"
                    )
        for saved in self.modules_to_save:
            if not any(_named(name, saved, [saved]) for name in modules):
                raise ConfigError(f"student.modules_to_save: {kind} has no module {saved}; {_near(saved, modules)}")

    def inject(self, model: Any) -> None:
        """Put the adapter into `model`, frozen but for it and `modules_to_save`. Equal on every rank."""
        from peft import LoraConfig, inject_adapter_in_model

        self.check(model)
        model.requires_grad_(False)
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # annotated as an int, used as a number
            lora_dropout=self.dropout,
            target_modules=targets,
            use_dora=self.dora,
            use_rslora=self.rslora,
            init_lora_weights=INITS.get(self.init, self.init),
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out")  # peft sees Conv1D by itself
            torch.manual_seed(self.seed)
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        model.requires_grad_(False)
        for name, parameter in model.named_parameters(remove_duplicate=False):  # a tied head is the embedding too
            if ".lora_" in name or any(_holds(name, saved) for saved in self.modules_to_save):
                parameter.requires_grad_(True)

    def described(self, base: str | None, whole: Sequence[str]) -> dict[str, Any]:
        """peft's adapter_config.json. `whole`: names of the modules that learned beside the adapter."""
        from peft import LoraConfig

        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            inference_mode=True,
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            use_dora=self.dora,
            use_rslora=self.rslora,
            modules_to_save=list(whole) or None,
        )
        return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def require(package: str, extra: str, what: str) -> None:
    """Raises ConfigError where a package that `what` needs is not installed."""
    if find_spec(package) is None:
        raise ConfigError(f'{what} needs the package {package}; run `pip install "kdcli[{extra}]"`')


def _listed(targets: Sequence[str] | str) -> list[str]:
    if isinstance(targets, str):
        return [] if targets == ALL else [targets]
    return list(targets)


def _named(name: str, target: str, targets: Sequence[str] | str) -> bool:
    """peft's rule: one text is a regular expression of whole names; of a list, each is a name or its end."""
    if isinstance(targets, str):
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")


def _holds(parameter: str, module: str) -> bool:
    return f".{module}." in f".{parameter}"


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in LINEAR


def _near(word: str, names: Any) -> str:
    """`did you mean q_proj?`, or what there is."""
    ends = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()} - {""})
    close = difflib.get_close_matches(word, ends, n=1) or difflib.get_close_matches(word.rpartition(".")[2], ends, n=1)
    return f"did you mean {close[0]}?" if close else f"there is {', '.join(ends[:12])}"
