"""The optimiser and its schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llava_edge.train_gpu.config import OptimConfig
    from llava_edge.train_gpu.model import Trainee


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up over the first part of the run, then a cosine to 0. ``progress`` runs from 0 to 1."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def warmup_share(steps: int, ratio: float) -> float:
    """The share of the run that is warm-up, in whole steps rounded up."""
    return min(math.ceil(steps * ratio) / steps, 0.999)


def make_optimizer(trainee: Trainee, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with a group for each of projector, tower and LLM; ``base_lr`` of a group is its highest rate."""
    rates = {"projector": optim.projector_lr, "tower": optim.tower_lr}
    groups: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in trainee.named_parameters():
        if parameter.requires_grad:
            part = name.split(".")[0]
            groups.setdefault(part if part in rates else "llm", []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "base_lr": rates.get(part) or optim.lr} for part, parameters in groups.items()],
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        fused=True,
    )
