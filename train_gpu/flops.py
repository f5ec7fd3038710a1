"""How many operations a step takes, for the share of the machine that it uses (MFU).

Counted are the matrix products that the step cannot do without: two operations a parameter and token forward, as many
again for the gradient of what a layer reads where something before it is trained, and for its own weights' gradient
where it is trained. Recomputation under gradient checkpointing is work, but not useful work, and is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from llava_edge.train_gpu.model import Trainee
    from llava_edge.train_gpu.rows import Batch

# Dense bfloat16 from the vendors' data sheets, in TFLOP/s of one device, by a part of its name.
PEAK_TFLOPS = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10G": 70.0,
    "RTX 4090": 165.0, "RTX 3090": 71.0, "V100": 125.0, "T4": 65.0,
}  # fmt: skip


class FlopCounter:
    """Operations of batches. Parameters are counted once, before they are divided over processes."""

    def __init__(self, trainee: Trainee) -> None:
        text = trainee.config.text_config
        self.text_layers: int = text.num_hidden_layers
        self.text_width: int = text.hidden_size
        embedding = trainee.embed.weight.numel()
        self.head, self.head_trained = embedding, trainee.head.weight.requires_grad
        self.llm = _numel(trainee.llm) - embedding
        self.llm_trained = _numel(trainee.llm, trained=True) - (embedding if trainee.embed.weight.requires_grad else 0)
        self.projector = _numel(trainee.projector)
        vision = trainee.config.vision_config
        self.patches: int = (vision.image_size // vision.patch_size) ** 2
        self.tower = _numel(trainee.tower) if trainee.tower is not None else 0
        self.tower_trained = _numel(trainee.tower, trained=True) if trainee.tower is not None else 0

    def count(self, batch: Batch) -> float:
        """Operations of one forward and backward pass."""
        total: float = batch.real_tokens * (4 * self.llm + 2 * self.llm_trained)
        total += batch.n_labels * self.head * (6 if self.head_trained else 4)
        total += batch.n_pictures * self.patches * 6 * self.projector
        tower = self.tower_trained if batch.are_features else self.tower
        total += batch.n_pictures * self.patches * (2 * tower + 4 * self.tower_trained)
        # Scores and values: 4 operations a pair and width forward, 8 backward.
        return total + 12.0 * self.text_layers * self.text_width * _attended_pairs(batch)


def peak_flops(device: torch.device, given_tflops: float | None) -> float | None:
    """What the device can do in a second, or None where nobody knows."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def _attended_pairs(batch: Batch) -> float:
    pairs = 0.0
    for row in range(len(batch.ids)):
        lengths = torch.bincount(batch.documents[row])[1:]
        pairs += float((lengths.double() ** 2).sum()) / 2
    return pairs


def _numel(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
