"""Cached vision features: while the tower is frozen, each picture goes through it once.

Shapes: N pictures, P patches, D width of the concatenated feature layers.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.images import fit, normalize, open_image

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import LlavaForConditionalGeneration

    from llava_edge.train_gpu.samples import PictureRef
    from llava_edge.types import ImageSpec

log = logging.getLogger(__name__)


def encode_pixels(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """``[B, 3, H, W]`` to ``[B, P, D]``: the configured hidden states side by side, without the class token if any.

    With ``vision_class_token: false`` the class token is also hidden from every patch.
    """
    return tower_features(model.model.vision_tower, model.config, pixels)


def tower_features(tower: Any, config: Any, pixels: torch.Tensor) -> torch.Tensor:
    """See :func:`encode_pixels`."""
    options: dict[str, Any] = {}
    if not getattr(config, "vision_class_token", True):
        patches = (pixels.shape[-1] // config.vision_config.patch_size) ** 2
        options["attention_mask"] = torch.ones(pixels.shape[0], patches + 1, dtype=torch.long, device=pixels.device)
        options["attention_mask"][:, 0] = 0
    states = tower(pixels, output_hidden_states=True, **options).hidden_states
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    return torch.cat([states[layer][:, first:] for layer in feature_layers(config)], dim=-1)


def feature_layers(config: Any) -> list[int]:
    """The hidden states that feed the projector, in its order; 0 is the input of the first block."""
    layers = config.vision_feature_layer
    depth = config.vision_config.num_hidden_layers
    return [layer if layer >= 0 else depth + 1 + layer for layer in ([layers] if isinstance(layers, int) else layers)]


class FeatureCache:
    """Features of many pictures in one file, ``float16 [N, P, D]``, found by the picture's name."""

    def __init__(self, directory: Path) -> None:
        try:
            index = json.loads((directory / "index.json").read_text())
        except FileNotFoundError:
            raise InputError(
                f"no feature cache in {directory}", hint="Make it with `python -m llava_edge.train_gpu.prepare_nano`."
            ) from None
        self.rows: dict[str, int] = {name: row for row, name in enumerate(index["names"])}
        self.array: NDArray[np.float16] = np.memmap(
            directory / "features.f16", dtype=np.float16, mode="r", shape=tuple(index["shape"])
        )

    def __getitem__(self, name: str) -> NDArray[np.float16]:
        """``float16 [P, D]``."""
        try:
            row = self.rows[name]
        except KeyError:
            raise InputError(f"picture {name!r} is not in the feature cache") from None
        return np.asarray(self.array[row])

    def find(self, picture: PictureRef) -> NDArray[np.float16]:
        """``float16 [P, D]`` of a sample's picture."""
        return self[picture.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(P, D)``."""
        return self.array.shape[1:]

    def statistics(self, pictures: int = 512) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation per feature ``[D]`` over evenly spaced pictures."""
        step = max(1, len(self.array) // pictures)
        sample = np.asarray(self.array[::step], dtype=np.float32)
        return sample.mean(axis=(0, 1)), sample.std(axis=(0, 1)) + 1e-6


def build_cache(
    model: LlavaForConditionalGeneration,
    spec: ImageSpec,
    root: Path,
    names: Sequence[str],
    directory: Path,
    batch_size: int = 16,
) -> FeatureCache:
    """Encode ``root/NAME`` for every name and write the cache; a picture that can't be read is an error.

    The tower runs in bfloat16 where the processor has it; elsewhere that takes eight times as long. The index is
    written last, so a half-made cache is never taken for a whole one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    shape = (len(names), config.image_seq_length, width)
    index = directory / "index.json"
    index.unlink(missing_ok=True)
    array = np.memmap(directory / "features.f16", dtype=np.float16, mode="w+", shape=shape)
    start = time.monotonic()
    fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=fast):
        for first, pixels in _batches(spec, root, names, batch_size):
            features = encode_pixels(model, pixels)
            array[first : first + len(features)] = features.float().clamp(-6e4, 6e4).numpy()
            done = first + len(features)
            if done % (batch_size * 16) == 0 or done == len(names):
                rate = done / (time.monotonic() - start)
                log.info("%d of %d pictures, %.1f a second", done, len(names), rate)
    array.flush()
    partial = index.with_suffix(".partial")
    partial.write_text(json.dumps({"shape": shape, "names": list(names)}))
    partial.replace(index)
    return FeatureCache(directory)


def _batches(spec: ImageSpec, root: Path, names: Sequence[str], batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    for first in range(0, len(names), batch_size):
        try:
            pictures = [
                normalize(fit(open_image(root / name, pad_color=spec.pad_color), spec), spec)
                for name in names[first : first + batch_size]
            ]
        except LlavaEdgeError as error:
            raise InputError(f"training picture: {error}") from error
        yield first, torch.from_numpy(np.stack(pictures))
