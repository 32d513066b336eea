"""A frozen transformers causal language model whose layers wait on the CPU or on disk until they run."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import nn

from kdcli.store import paths
from kdcli.store.adapters import require
from kdcli.store.layers import stack
from kdcli.teacher._hf import Frozen, Settings

log = logging.getLogger(__name__)


class HFOffloadedTeacher(Frozen):
    """The embeddings, the last norm and the head stay on the device; accelerate brings one layer at a time there and
    drops it again. `offload: cpu` keeps the layers in the CPU's memory; `disk` reads them from the model's own
    safetensors in every pass, which the system's file cache makes quick where there is room. What transformers has to
    convert first (fused experts) is written below `folder`, by default into kdcli's cache, and removed at the end.

    Raises ConfigError without accelerate.
    """

    def __init__(
        self, *, offload: Literal["cpu", "disk"] = "cpu", folder: str | None = None, **settings: Unpack[Settings]
    ) -> None:
        require("accelerate", "large", "teacher=hf_offloaded")
        super().__init__(**settings)  # pyright: ignore[reportCallIssue]
        self.offload = offload
        self.folder = folder
        self._converted: tempfile.TemporaryDirectory[str] | None = None

    def load(self, device: torch.device) -> None:
        if (device.type, self.offload) == ("cpu", "cpu"):
            log.info("teacher: the device is the CPU, so offload=cpu spares nothing; offload=disk does")
            return self._take(self._load(device))
        outline = self._load("meta", {"device_map": "meta"})
        where = placement(outline, stack(outline)[0], str(device), self.offload)
        parent = Path(self.folder).expanduser() if self.folder else paths.cache() / "offload"
        parent.mkdir(parents=True, exist_ok=True)
        self._converted = tempfile.TemporaryDirectory(dir=parent)
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what was asked for
        self._take(self._load(device, {"device_map": where, "offload_folder": self._converted.name}))


def placement(model: Any, layers: str, device: str, offload: str) -> dict[str, str]:
    """Module or parameter -> device, of the whole model: the list named `layers` at `offload`, all else at `device`."""
    places: dict[str, str] = {}
    parent: nn.Module = model
    prefix = ""
    for step in layers.split("."):
        own = [name for name, _ in (*parent.named_parameters(recurse=False), *parent.named_buffers(recurse=False))]
        places |= {prefix + name: device for name in own}
        places |= {prefix + name: device for name, _ in parent.named_children() if name != step}
        parent, prefix = parent.get_submodule(step), f"{prefix}{step}."
    return places | {layers: offload}
