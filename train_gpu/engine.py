"""Where a run computes: one process or many, through Accelerate, and how its state is gathered and divided."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from llava_edge.errors import InputError
from llava_edge.train_gpu import checkpoint
from llava_edge.train_gpu.allocator import keep_freed_memory
from llava_edge.train_gpu.features import used_blocks
from llava_edge.train_gpu.precision import uses_bfloat16

if TYPE_CHECKING:
    from llava_edge.train_gpu.config import ScaleConfig
    from llava_edge.train_gpu.model import Trainee

_TRAINED = StateDictOptions(ignore_frozen_params=True)
# The settings of an optimiser's groups that are the recipe's, and not the state of a run.
_SETTINGS = ("base_lr", "betas", "weight_decay")
# How long the others wait while the main process caches features, hashes data or writes the checkpoint; by default
# NCCL ends a run after ten minutes of it. A process that has died ends the run at once all the same.
_PATIENCE = timedelta(days=1)


class Engine:
    """The model and the optimiser on their devices. ``forward`` is what is called; ``trainee`` is what it holds."""

    def __init__(self, trainee: Trainee, optimizer: torch.optim.Optimizer, scale: ScaleConfig) -> None:
        self.sharded = scale.sharding == "fsdp2"
        self.accelerator = Accelerator(
            fsdp_plugin=_fsdp_plugin(trainee, scale) if self.sharded else None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
        if self.sharded and self.accelerator.num_processes == 1:
            raise InputError(
                "scale.sharding fsdp2 divides a model over several processes; there is one",
                hint="Start it with torchrun, or set scale.sharding to none.",
            )
        if scale.compile:
            compile_layers(trainee)
        self.forward: nn.Module
        self.forward, prepared = self.accelerator.prepare(trainee, optimizer)
        self.optimizer: torch.optim.Optimizer = prepared.optimizer
        self.trainee = cast("Trainee", self.accelerator.unwrap_model(self.forward))
        self.trained = [p for p in self.trainee.parameters() if p.requires_grad]
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def rank(self) -> int:
        """The number of this process."""
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        """How many processes there are."""
        return int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process writes what there is once."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return cast(torch.device, self.accelerator.device)

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each number, added up over the processes."""
        if self.world == 1:
            return [float(value) for value in values]  # not every device has float64
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total]

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Inside it gradients stay in their process, unless it is the ``last`` pass of a step.

        Divided ones are always shared out: kept, those of the whole model would lie in each process.
        """
        if last or self.world == 1 or self.sharded:
            return nullcontext()
        return cast("AbstractContextManager[Any]", self.accelerator.no_sync(self.forward))

    def clip(self, limit: float) -> float:
        """Bring the gradient's norm below a limit, and tell what it was."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained, limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def save(self, directory: Path, values: dict[str, Any]) -> None:
        """Write weights, optimiser, random state and ``values`` into a folder; every process calls it."""
        if self.sharded:
            weights, optimizer = get_state_dict(self.forward, self.optimizer, options=_TRAINED)
            state_dict_saver.save({"weights": weights, "optimizer": optimizer}, checkpoint_id=directory / "shards")
        elif self.main:
            torch.save(
                {"weights": self.trainee.trained_state(), "optimizer": self.optimizer.state_dict()},
                directory / "state.pt",
            )
        if self.main:
            torch.save(values, directory / "run.pt")
        torch.save(_random_state(), directory / f"random-{self.rank}.pt")

    def restore(self, directory: Path) -> dict[str, Any]:
        """Take up what :meth:`save` wrote and return its ``values``. Rates and decay stay those of the recipe."""
        settings = [{name: group[name] for name in _SETTINGS} for group in self.optimizer.param_groups]
        if self.sharded:
            weights, optimizer = get_state_dict(self.forward, self.optimizer, options=_TRAINED)
            shards: dict[str, Any] = {"weights": weights, "optimizer": optimizer}
            state_dict_loader.load(shards, checkpoint_id=directory / "shards")
            set_state_dict(
                self.forward,
                self.optimizer,
                model_state_dict=shards["weights"],
                optim_state_dict=shards["optimizer"],
                options=StateDictOptions(ignore_frozen_params=True, strict=False),
            )
        else:
            state = checkpoint.load(directory / "state.pt")
            expected, found = self.trainee.trained_state(), state["weights"]
            if {n: p.shape for n, p in expected.items()} != {n: p.shape for n, p in found.items()}:
                raise InputError(f"{directory} was saved by a run that trains other weights than this recipe")
            self.trainee.load_state_dict(found, strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)
        if (directory / f"random-{self.rank}.pt").is_file():
            _set_random_state(checkpoint.load(directory / f"random-{self.rank}.pt"))
        return checkpoint.load(directory / "run.pt")

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """What was trained, gathered on the main process; empty on the others."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return cast("dict[str, torch.Tensor]", get_model_state_dict(self.forward, options=options))


def compile_layers(trainee: Trainee) -> None:
    """Have the language model's layers, and blocks of the tower that are trained, compiled at their first pass.

    Layers are alike, so that one is compiled for all: on two cores half a minute, where the whole model takes minutes.

    Raises
    ------
    InputError
        A CPU computes, and there is no C++ compiler.
    """
    if not torch.cuda.is_available():
        # the compiler's own modules are imported where it is wanted only
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise InputError(
                "scale.compile needs a C++ compiler, and none was found",
                hint="Install g++ or clang (on macOS `xcode-select --install`), or set scale.compile to false.",
            ) from None
    layers = [m for m in trainee.llm.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    for layer in (layer for alike in layers for layer in alike):
        layer.compile(dynamic=True)
    if trainee.tower is not None:
        for block in used_blocks(trainee.tower, trainee.config):
            if any(p.requires_grad for p in block.parameters()):
                block.compile(dynamic=True)


def _fsdp_plugin(trainee: Trainee, scale: ScaleConfig) -> FullyShardedDataParallelPlugin:
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if uses_bfloat16(scale) else None
    blocks = {type(m[0]).__name__ for m in trainee.modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(blocks),
        mixed_precision_policy=policy,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )


def _random_state() -> dict[str, Any]:
    kind, keys, place, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), place, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
