"""Cached vision features: each picture goes through what is frozen of the tower once.

Where the tower's last blocks are trained, what is cached are the hidden states that enter the first of them.

Shapes: N pictures, P patches, D width of the concatenated feature layers, T positions of a hidden state (P, and one
for a class token), H its width.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.images import fit, normalize, open_image
from llava_edge.train_gpu.precision import has_bfloat16

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
    states = _hidden_states(tower, config, pixels)
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    return torch.cat([states[layer][:, first:] for layer in feature_layers(config)], dim=-1)


def frozen_features(tower: Any, config: Any, pixels: torch.Tensor, blocks: int) -> torch.Tensor:
    """What a cache holds of pictures: :func:`tower_features`, or with ``blocks`` :func:`before_blocks`."""
    return before_blocks(tower, config, pixels, blocks) if blocks else tower_features(tower, config, pixels)


class _Reached(Exception):
    """What is wanted of a tower is there."""


def before_blocks(tower: Any, config: Any, pixels: torch.Tensor, blocks: int) -> torch.Tensor:
    """``[B, 3, H, W]`` to what enters the last ``blocks`` of :func:`used_blocks`, ``[B, T, H]``.

    A class token that is hidden from the patches is left out. InputError if there are fewer blocks.
    """
    if blocks > len(used_blocks(tower, config)):
        raise InputError(f"the features pass {len(used_blocks(tower, config))} blocks of the tower, not {blocks}")
    entered: list[torch.Tensor] = []

    def stop(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        entered.append(inputs[0])
        raise _Reached

    hook = used_blocks(tower, config)[-blocks].register_forward_pre_hook(stop)
    try:
        tower(pixels, **_class_token_hidden(config, pixels))
    except _Reached:
        pass  # the blocks behind need not run
    finally:
        hook.remove()
    return entered[0] if _class_token_seen(config) else entered[0][:, 1:]


def through_blocks(tower: Any, config: Any, states: torch.Tensor, blocks: int) -> torch.Tensor:
    """The rest of the way: what :func:`before_blocks` gave, ``[B, T, H]``, to features ``[B, P, D]``."""
    layers = feature_layers(config)
    number = max(layers) - blocks
    if min(layers) < number:
        raise InputError(
            f"the features read hidden state {min(layers)}, which lies before the last {blocks} blocks of the tower",
            hint=f"Train at least {max(layers) - min(layers)} blocks of the tower, or none.",
        )
    reached = {number: states}
    for block in used_blocks(tower, config)[-blocks:]:
        states = block(states, attention_mask=None)
        number += 1
        reached[number] = states
    first = 1 if config.vision_feature_select_strategy == "default" and _class_token_seen(config) else 0
    return torch.cat([reached[layer][:, first:] for layer in layers], dim=-1)


def used_blocks(tower: nn.Module, config: Any) -> list[nn.Module]:
    """The blocks of a vision tower that the features pass through, in order."""
    depth = config.vision_config.num_hidden_layers
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise InputError(f"the tower {type(tower).__name__} has no list of {depth} blocks to train")
    return list(lists[0])[: max(feature_layers(config))]


def cached_shape(config: Any, blocks: int) -> tuple[int, int]:
    """Shape of a picture's row in a cache that leaves the last ``blocks`` to be run: ``(P, D)``, or ``(T, H)``."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    if not blocks:
        return patches, vision.hidden_size * len(feature_layers(config))
    class_token = config.vision_feature_select_strategy == "default" and _class_token_seen(config)
    return patches + class_token, vision.hidden_size


def _class_token_seen(config: Any) -> bool:
    return bool(getattr(config, "vision_class_token", True))


def _hidden_states(tower: Any, config: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    options = _class_token_hidden(config, pixels)
    states: tuple[torch.Tensor, ...] = tower(pixels, output_hidden_states=True, **options).hidden_states
    return states


def _class_token_hidden(config: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tower's argument that hides its class token from every patch, where that is wanted."""
    if _class_token_seen(config):
        return {}
    patches = (pixels.shape[-1] // config.vision_config.patch_size) ** 2
    mask = torch.ones(pixels.shape[0], patches + 1, dtype=torch.long, device=pixels.device)
    mask[:, 0] = 0
    return {"attention_mask": mask}


def feature_layers(config: Any) -> list[int]:
    """The hidden states that feed the projector, in its order; 0 is the input of the first block."""
    layers = config.vision_feature_layer
    depth = config.vision_config.num_hidden_layers
    return [layer if layer >= 0 else depth + 1 + layer for layer in ([layers] if isinstance(layers, int) else layers)]


class FeatureCache:
    """Features of many pictures in one file, ``float16 [N, P, D]``, found by the picture's name.

    With ``blocks`` above 0 they are what enters the tower's last blocks, ``float16 [N, T, H]``.
    """

    def __init__(self, directory: Path) -> None:
        try:
            index = json.loads((directory / "index.json").read_text())
        except FileNotFoundError:
            raise InputError(
                f"no feature cache in {directory}",
                hint="Make it with `python -m llava_edge.train_gpu.prepare_nano`, or `teach_words --pictures`.",
            ) from None
        self.rows: dict[str, int] = {name: row for row, name in enumerate(index["names"])}
        self.blocks: int = index.get("blocks", 0)  # a cache of an earlier version has none
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

    def require(self, names: Iterable[str]) -> None:
        """InputError if one of the pictures is not there: told at once, and not after hours of work."""
        missing = {name for name in names if name not in self.rows}
        if missing:
            raise InputError(
                f"the feature cache lacks {len(missing)} of the samples' pictures, such as {min(missing)}",
                hint="Make a cache of all of them in a new folder.",
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(P, D)``, or ``(T, H)``."""
        return self.array.shape[1:]

    @torch.no_grad()
    def statistics(self, tower: Any, config: Any, pictures: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation per feature ``[D]`` over evenly spaced pictures, behind the whole tower."""
        chosen = np.arange(0, len(self.array), max(1, len(self.array) // pictures))
        parts = []
        for rows in np.array_split(chosen, math.ceil(len(chosen) / 32)):
            states = torch.from_numpy(np.asarray(self.array[rows], dtype=np.float32))
            if self.blocks:
                dtype = next(used_blocks(tower, config)[-1].parameters()).dtype
                states = through_blocks(tower, config, states.to(dtype), self.blocks).float()
            parts.append(states)
        sample = torch.cat(parts)
        return sample.mean(dim=(0, 1)), sample.std(dim=(0, 1)) + 1e-6


def build_cache(
    model: LlavaForConditionalGeneration,
    spec: ImageSpec,
    root: Path,
    names: Sequence[str],
    directory: Path,
    blocks: int = 0,
    batch_size: int = 16,
) -> FeatureCache:
    """Encode ``root/NAME`` for every name and write the cache; a picture that can't be read is an error.

    The last ``blocks`` of the tower are left to be run with what is cached, so that they can be trained. The tower runs
    in bfloat16 where the CPU computes in it. The index is written last, so a half-made cache is never taken for whole.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tower, config = model.model.vision_tower, model.config
    shape = (len(names), *cached_shape(config, blocks))
    index = directory / "index.json"
    index.unlink(missing_ok=True)
    array = np.memmap(directory / "features.f16", dtype=np.float16, mode="w+", shape=shape)
    start = time.monotonic()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu")):
        for first, pixels in _batches(spec, root, names, batch_size):
            features = frozen_features(tower, config, pixels, blocks)
            array[first : first + len(features)] = features.float().clamp(-6e4, 6e4).numpy()
            done = first + len(features)
            if done % (batch_size * 16) == 0 or done == len(names):
                rate = done / (time.monotonic() - start)
                log.info("%d of %d pictures, %.1f a second", done, len(names), rate)
    array.flush()
    partial = index.with_suffix(".partial")
    partial.write_text(json.dumps({"shape": shape, "blocks": blocks, "names": list(names)}))
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
