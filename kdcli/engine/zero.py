"""DeepSpeed ZeRO 0 to 3, on GPUs (nccl) and on CPUs (gloo), behind the Engine interface."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdcli.api import Engine, OptimizerFactory, ScheduleFactory
from kdcli.engine import _frozen, _reshard, _saved, _schedule
from kdcli.errors import ConfigError, NumericsError
from kdcli.store import atomic
from kdcli.store.fault import fault

log = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "fp16", "bf16_autocast"]
MAX_OVERFLOWS = 50  # fp16: the loss scale falls from 2**16 to 1 in 16 skipped steps; more in a row is no overflow


class Zero(Engine):
    """ZeRO stage 0 (every rank holds everything), 1 (shards the optimizer), 2 (and gradients), 3 (and parameters).

    precision: `fp32`; `bf16` or `fp16` (16-bit parameters, 32-bit master copy in the optimizer; stage 0 becomes
    stage 1); `bf16_autocast` (32-bit parameters, 16-bit matrix products); `auto` is bf16_autocast where the
    device has bf16 units, else fp32. Weight decay spares biases and norms unless `decay_all`.
    `deepspeed` is merged over the DeepSpeed configuration written here.
    """

    def __init__(
        self,
        *,
        stage: Literal[0, 1, 2, 3] = 0,
        precision: Precision = "auto",
        gradient_clipping: float | None = 1.0,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        activation_checkpointing: bool = False,
        decay_all: bool = False,
        collective_timeout: float = 10.0,
        deepspeed: Mapping[str, Any] | None = None,
    ) -> None:
        if offload_parameters and stage != 3:
            raise ConfigError(f"engine.offload_parameters: only stage 3 shards parameters, not stage {stage}")
        if offload_optimizer and stage == 0:
            raise ConfigError("engine.offload_optimizer: stage 0 keeps the optimizer whole; use engine=zero1 or above")
        if gradient_clipping is not None and gradient_clipping <= 0:
            raise ConfigError(f"engine.gradient_clipping: {gradient_clipping} is not positive; null switches it off")
        self.stage = stage
        self.precision = precision
        self.gradient_clipping = gradient_clipping
        self.offload_optimizer = offload_optimizer
        self.offload_parameters = offload_parameters
        self.activation_checkpointing = activation_checkpointing
        self.decay_all = decay_all
        self.collective_timeout = timedelta(minutes=collective_timeout)
        self.deepspeed = dict(deepspeed or {})
        self.device = torch.device("cpu")
        self._engine: Any = None
        self._optimizer: Any = None
        self._frozen: list[_frozen.Frozen] = []
        self._overflows = 0
        self._joined = False  # the process group is ours to destroy

    # ------------------------------------------------------------------------------------------ start and prepare

    def start(self) -> None:
        _quiet_environment()
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it also without a launcher
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        import deepspeed
        import deepspeed.ops

        operators: Any = deepspeed.ops
        if self.device.type == "cpu":
            operators.__compatible_ops__ = {}  # or init_distributed compiles a C++ operator nobody uses
        deepspeed.utils.logger.setLevel(logging.ERROR)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if not torch.distributed.is_initialized():
            # One process needs no port, so jobs of a sweep never collide.
            store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            alone: dict[str, Any] = {} if "MASTER_ADDR" in os.environ else {"store": store}
            torch.distributed.init_process_group(
                backend, rank=self.rank, world_size=self.world_size, timeout=self.collective_timeout, **alone
            )
            self._joined = True
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        # DeepSpeed makes groups of its own, which would wait torch's 30 minutes for a rank that hangs.
        communication: Any = deepspeed.comm.comm
        communication.cdb.new_group = partial(torch.distributed.new_group, timeout=self.collective_timeout)
        _allow_deepspeed_classes()
        self._choose_precision()

    def prepare(
        self, module: nn.Module, *, optimizer: OptimizerFactory, lr_schedule: ScheduleFactory, micro_size: int
    ) -> None:
        import deepspeed

        if self.activation_checkpointing:
            _checkpoint_activations(module)
        groups = self._parameter_groups(module)
        if not groups:
            raise ConfigError("the student has no parameter that may learn: all are frozen")
        self._groups = [dict(group) for group in groups]
        built = optimizer(groups)
        schedule: Any = lr_schedule(built)
        self._built = [{key: value for key, value in group.items() if key != "params"} for group in built.param_groups]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=built,
            lr_scheduler=schedule,
            config=self._deepspeed_config(micro_size),
            dist_init_required=False,
        )
        self._engine._copy_recovery_script = lambda _: None  # no programs in a checkpoint

    def _choose_precision(self) -> None:
        from deepspeed.accelerator import get_accelerator

        if self.precision == "auto":
            self.precision = "bf16_autocast" if _has_bf16_units(self.device) else "fp32"
        if self.stage == 0 and self.precision in ("bf16", "fp16"):
            # DeepSpeed 0.19 takes an optimizer step with zero gradients while it builds stage 0 in 16 bit.
            log.info("engine: stage 0 with %s trains as stage 1 (the same memory on one rank)", self.precision)
            self.stage = 1
        accelerator: Any = get_accelerator()
        if self.precision == "fp16" and not accelerator.is_fp16_supported():
            raise ConfigError(
                f"engine.precision: fp16 does not work on this {self.device.type}; use bf16_autocast or fp32"
            )

    def _parameter_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Matrices decay; vectors (biases, norms) do not."""
        learning = [p for p in module.parameters() if p.requires_grad]
        if self.decay_all:
            return [{"params": learning}] if learning else []
        matrices = {"params": [p for p in learning if p.dim() >= 2]}
        vectors = {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0}
        return [group for group in (matrices, vectors) if group["params"]]

    def _deepspeed_config(self, micro_size: int) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self.stage == 3:
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_size,
            # Only has to be > 1, so that every stage keeps a buffer to accumulate in: the loop normalises
            # losses itself and says which backward is the last.
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0 if self.stage == 0 else self.gradient_clipping or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if self.precision in ("bf16", "fp16"):
            config[self.precision] = {"enabled": True}
        elif self.precision == "bf16_autocast":
            # No "safe" modules: gradients are reduced in 32 bit, only the products are in 16.
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        return _merged(config, self.deepspeed)

    # ---------------------------------------------------------------------------------------------------- train

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks; the loop's shares are to be summed.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> float:
        """Raises NumericsError, before any parameter changes, when the gradient is not finite; with fp16 such
        a step is skipped and the loss scale lowered, and the norm returned is infinity."""
        if self.stage == 0:
            norm = self._clip()
            if math.isfinite(norm):
                self._engine.step()
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
        if math.isfinite(norm) and not getattr(self._optimizer, "overflow", False):
            self._overflows = 0
            return norm
        self._overflows += 1
        if self.precision == "fp16" and self._overflows <= MAX_OVERFLOWS:
            log.info("engine: fp16 overflow, step skipped, loss scale now %g", self._optimizer.cur_scale)
            return math.inf
        raise NumericsError("the gradient is not finite")

    def _clip(self) -> float:
        """Stage 0's own clipping, with the norm in float64 as the other stages form it, so that all agree."""
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in gradients))
        limit = self.gradient_clipping or math.inf
        if math.isfinite(norm) and norm > limit:
            for gradient in gradients:
                gradient.mul_(limit / (norm + 1e-6))
        return norm

    @property
    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    # ---------------------------------------------------------------------------------------------- among ranks

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for part in self.gather(dict(values)):
            for key, value in part.items():
                totals[key] = totals.get(key, 0.0) + float(value)
        return totals

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        return _frozen.whole(parameters)

    def sharded(self, load: Callable[[], Any], dtype: torch.dtype) -> Any:
        self._frozen.append(_frozen.Frozen(load, dtype))
        return self._frozen[-1].model

    # ---------------------------------------------------------------------------------------- save, load, export

    def save(self, folder: Path) -> None:
        # The version marks shards that can be read for another world size or stage; the order numbers the
        # states of stage 0's optimizer.
        client = {
            "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
            "kdcli_order": self._parameter_names(),
        }
        with self._late_errors():
            self._engine.save_checkpoint(str(folder.parent), folder.name, client_state=client, save_latest=False)
        if self.rank == 0:
            atomic.write_json(folder / "engine.json", self._layout())

    @contextmanager
    def _late_errors(self) -> Iterator[None]:
        """Let a rank that cannot write (a full disk) fail after DeepSpeed's barriers, not between them: the
        others would wait there for ever."""
        writer, errors = self._engine.checkpoint_engine, []
        write = writer.save

        def guarded(state_dict: Any, path: str) -> None:
            try:
                fault("ckpt.shard", rank=self.rank, step=self._engine.global_steps)
                write(state_dict, path)
            except (OSError, RuntimeError) as error:
                errors.append(error)

        writer.save = guarded
        try:
            yield
        finally:
            del writer.save
        if errors:
            raise errors[0]

    def load(self, folder: Path) -> None:
        """Raises ConfigError when the shards hold anything but tensors and plain values, or cannot be resharded."""
        saved = json.loads((folder / "engine.json").read_text("utf-8"))
        with _only_data(folder):
            if saved == self._layout():
                self._engine.load_checkpoint(str(folder.parent), folder.name, load_lr_scheduler_states=False)
                self._go_on(_reshard.model_state(folder))
            else:
                log.info("engine: continuing %s with %s", _worded(saved), _worded(self._layout()))
                self._load_resharded(folder)

    def saved(self, folder: Path) -> Mapping[str, Callable[[], Tensor]]:
        _quiet_environment()
        _allow_deepspeed_classes()
        with _only_data(folder):
            return _saved.weights(folder)

    def _load_resharded(self, folder: Path) -> None:
        """Through whole tensors in a folder beside the shards, on the same disk, removed afterwards."""
        temporary = folder.parent / ".tmp-whole"
        whole = temporary / "step"
        problem: Exception | None = None
        try:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                try:
                    whole.mkdir(parents=True)
                    _reshard.to_whole(folder, whole)
                except Exception as error:  # every rank must hear of it, or the others would wait
                    problem = error
            problem = self.gather(problem)[0]
            if problem is not None:
                raise problem
            _reshard.from_whole(self._engine, self.stage, whole)
            self._go_on(_reshard.model_state(whole))
        finally:
            self.gather(None)
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _go_on(self, saved: Mapping[str, Any]) -> None:
        self._engine.global_steps, self._engine.skipped_steps = saved["global_steps"], saved["skipped_steps"]
        groups = self._engine.basic_optimizer.param_groups
        _schedule.go_on(self._engine.lr_scheduler, saved["lr_scheduler"], groups, self._built)

    def _layout(self) -> dict[str, Any]:
        """What must be equal for shards to be read as they are."""
        return {"stage": self.stage, "world_size": self.world_size, "precision": self.precision}

    def _parameter_names(self) -> list[str]:
        """Names of the learning parameters, in the order of the optimizer's groups."""
        names = self._engine.param_names
        return [names[p] for group in self._groups for p in group["params"]]

    def full_state_dict(self) -> dict[str, Tensor] | None:
        if self.stage == 3:
            return self._engine._zero3_consolidated_16bit_state_dict()
        if self.rank > 0:
            return None
        copies: dict[Any, Tensor] = {}  # tied parameters stay one tensor
        state: dict[str, Tensor] = self._engine.module.state_dict()
        places = {name: (value.data_ptr(), value.shape, value.dtype) for name, value in state.items()}
        return {name: copies.setdefault(places[name], value.detach().cpu()) for name, value in state.items()}

    def close(self) -> None:
        """Leave this process as it was before `start`, so that another run may follow in it. Ranks of several
        processes keep their group: after a failure the others may not be there to take leave of."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = self._optimizer = None
        for frozen in self._frozen:
            frozen.close()
        self._frozen = []
        if self._joined and self.world_size == 1:
            import deepspeed

            communication: Any = deepspeed.comm.comm
            communication.destroy_process_group()
            communication.cdb = None
            self._joined = False


def _quiet_environment() -> None:
    """Silence, before DeepSpeed is imported, what tells a user nothing."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # A checkpoint is data: nothing this process loads may run code, whatever DeepSpeed asks torch.load for.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")


def _allow_deepspeed_classes() -> None:
    """The plain records that DeepSpeed keeps in its shards; all else but tensors and numbers is refused."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])


@contextmanager
def _only_data(folder: Path) -> Iterator[None]:
    """Raise ConfigError where a file of a checkpoint holds anything but tensors and plain values."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{folder}: refused, a file in it could run code: {str(error).splitlines()[0]}") from error


def _worded(layout: Mapping[str, Any]) -> str:
    return f"stage {layout['stage']} on {layout['world_size']} rank(s) in {layout['precision']}"


def _has_bf16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _checkpoint_activations(module: nn.Module) -> None:
    """Switch on recomputation in every transformers model inside `module`."""
    for child in module.modules():
        enable = getattr(child, "activation_checkpointing_enable", None) or getattr(
            child, "gradient_checkpointing_enable", None
        )
        if callable(enable):
            enable()
            return
    raise ConfigError("engine.activation_checkpointing: the student's model cannot recompute its activations")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
