"""A transformers language model that stays as it is but for a low-rank adapter: LoRA (arXiv:2106.09685), DoRA
(arXiv:2402.09353), and QLoRA (arXiv:2305.14314) on a model held in 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

import torch

from kdcli.errors import ConfigError
from kdcli.store.adapters import Adapter, Init, require
from kdcli.store.models import load_model
from kdcli.store.shards import is_quantized
from kdcli.student import _freeze
from kdcli.student.hf import HFSettings, HFStudent


class LoRA(HFStudent):
    """A student whose linear layers learn W + scaling * B A in place of W; on export W takes that in.

    scaling is alpha / rank, with `rslora` alpha / sqrt(rank) (arXiv:2312.03732). `dora` learns each output's length
    apart from its direction. `target_modules` are names of modules or their ends, one regular expression, or
    "all-linear", all but the head. `modules_to_save` learn whole; so do the embedding and the head where there are
    `new_tokens`, whose rows would stay means else. `train` lets more parameters learn, `freeze` fewer.
    `init=pissa` (arXiv:2404.02948) or `olora` (arXiv:2406.01775) begins with the weight's main directions.
    `quantization=4bit` loads `path` in NF4 through bitsandbytes. Other settings: HFStudent.

    Raises ConfigError for modules that do not exist or are not linear.
    """

    def __init__(
        self,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        target_modules: Sequence[str] | str = "all-linear",
        dora: bool = False,
        rslora: bool = False,
        modules_to_save: Sequence[str] = (),
        init: Init = "kaiming",
        seed: int = 0,
        quantization: Literal["4bit"] | None = None,
        **settings: Unpack[HFSettings],
    ) -> None:
        require("peft", "lora", "student=lora")
        if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
            wrong = "rank is at least 1" if rank < 1 else "alpha is above 0" if alpha <= 0 else "dropout is in [0, 1)"
            raise ConfigError(f"student: {wrong}; it is {rank if rank < 1 else alpha if alpha <= 0 else dropout}")
        super().__init__(**settings)
        self.adapter = Adapter(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            target_modules=target_modules,
            dora=dora,
            rslora=rslora,
            modules_to_save=tuple(modules_to_save),
            init=init,
            seed=seed,
        )
        self.quantization = quantization

    def check(self, architecture: Callable[[], Any], tokenizer: Callable[[], Any]) -> None:
        if self.quantization:
            for package in ("bitsandbytes", "accelerate"):
                require(package, "quant", f"student.quantization={self.quantization}")
        super().check(architecture, tokenizer)

    def adapts(self) -> bool:
        return True

    def sketched(self, model: Any) -> Any:
        with torch.device("meta"):
            replace(self.adapter, init="kaiming").inject(model)  # others look at the numbers of the model
        return model

    def loaded(self, path: str) -> Any:
        if self.quantization is None:
            return super().loaded(path)
        from transformers import BitsAndBytesConfig

        compute = torch.bfloat16 if self.dtype == "float32" else getattr(torch, self.dtype)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
        return load_model(
            path,
            dtype=self.dtype,
            attention=self.attention,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            placed={"device_map": {"": self.device}, "quantization_config": config},
        )

    def learning(self, model: Any) -> Any:
        quantized = any(map(is_quantized, model.parameters()))
        if self.quantization and not quantized:
            raise ConfigError(
                "student.quantization: this student_init makes another model; set student_init=pretrained"
            )
        return model if quantized else super().learning(model)

    def inject(self, model: Any) -> None:
        self.adapter.inject(model)
        for parameter in model.parameters():
            if self.quantization and parameter.requires_grad:  # peft makes it as coarse as the products are
                parameter.data = parameter.data.to(getattr(torch, self.dtype))
        if self.new_tokens:
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                if module is not None:
                    module.requires_grad_(True)

    def settle(self) -> None:
        super().settle()
        if self.quantization is not None:
            self.register_load_state_dict_pre_hook(_leave_out)

    def choose(self, model: Any) -> None:
        _freeze.choose(model, self.train_patterns, self.freeze_patterns, only=False)


def _leave_out(module: Any, state: dict[str, Any], *_: Any) -> None:
    """bitsandbytes saves how a weight was cut to 4 bits beside it, and does not read that back; it is as it was."""
    del module
    cut = {key.partition(".quant_state.")[0] for key in state if ".quant_state." in key}
    for key in [key for key in state if key.rpartition(".")[0] in cut or ".quant_state." in key]:
        del state[key]
