"""A frozen transformers causal language model, whole on every rank; in 8 or 4 bits if asked."""

from __future__ import annotations

import logging
from typing import Any, Literal, Unpack

import torch

from kdcli.store.adapters import require
from kdcli.teacher._hf import Frozen, Settings

Quantization = Literal["8bit", "4bit"]


class HFTeacher(Frozen):
    """Loads the model in `dtype`. With `quantization`, bitsandbytes keeps the matrices of the layers in 8 bits
    (LLM.int8(), arXiv:2208.07339; products in float16) or 4 (NF4, doubly quantised, arXiv:2305.14314; products in
    `dtype`), and the embeddings, the norms and the head stay in `dtype`; a student cannot be cut from such a teacher.

    Raises ConfigError for `quantization` without bitsandbytes.
    """

    def __init__(self, *, quantization: Quantization | None = None, **settings: Unpack[Settings]) -> None:
        super().__init__(**settings)  # pyright: ignore[reportCallIssue]
        if quantization is not None:
            for package in ("bitsandbytes", "accelerate"):
                require(package, "quant", f"teacher.quantization={quantization}")
        self.quantization = quantization
        self.model: Any = None  # transformers.PreTrainedModel, from `load` on; None in 8 or 4 bits

    def load(self, device: torch.device) -> None:
        if self.quantization is None:
            self.model = self._load(device)
            self._take(self.model)
        else:
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns in every product that it casts
            self._take(self._load(device, {"device_map": {"": device}, "quantization_config": self._quantized()}))

    def _quantized(self) -> Any:
        from transformers import BitsAndBytesConfig

        if self.quantization == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, self.dtype),
        )
