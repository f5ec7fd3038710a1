"""Whether a device computes in bfloat16, or only pretends to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llava_edge.train_gpu.config import ScaleConfig


def has_bfloat16(device_type: str) -> bool:
    """Whether the device has instructions for it.

    A CPU without them converts forth and back: on one with AVX2 alone a matrix product in bfloat16 took eight times as
    long as in float32.
    """
    if device_type == "cpu":
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return bool(supported and supported())
    return device_type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def uses_bfloat16(scale: ScaleConfig) -> bool:
    """What the recipe's ``scale.precision`` means on this machine."""
    if scale.precision == "auto":
        return has_bfloat16("cuda" if torch.cuda.is_available() else "cpu")
    return scale.precision == "bf16"
