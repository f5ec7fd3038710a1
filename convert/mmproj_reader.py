"""A correct reader of mmproj files: what the file says, computed by torch in float32, the class token first.

The parity gate measures a written file with it, because llama.cpp's own reader is wrong where a tower has a class
token or a projector more than two layers. Blocks are read one at a time.

Shapes: T tokens, W width of the tower, H heads, P patches, D width of the language model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class MmprojReader:
    """An mmproj GGUF of LLaVA's kind."""

    def __init__(self, path: Path) -> None:
        reader: Any = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = {name: field.contents() for name, field in reader.fields.items()}

    @torch.inference_mode()
    def encode(self, pixels: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Embeddings ``[P, D]`` of normalised pictures ``[3, S, S]``."""
        states = self.hidden_states(pixels)
        skipped = int("v.class_embd" in self._tensors)
        layers = self._fields["clip.vision.feature_layer"]
        found = []
        for index in range(len(pixels)):
            features = torch.cat([states[layer][index] for layer in layers], dim=-1)[skipped:]
            found.append(self._project(features).numpy())
        return found

    @torch.inference_mode()
    def hidden_states(self, pixels: Sequence[NDArray[np.float32]]) -> list[torch.Tensor]:
        """Hidden states ``[B, T, W]``, from the input of the first block on to the deepest that is needed."""
        states = [torch.stack([self._embed(torch.from_numpy(picture)) for picture in pixels])]
        for block in range(max(self._fields["clip.vision.feature_layer"])):
            states.append(self._block(f"v.blk.{block}", states[-1]))
        return states

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        size = self._fields["clip.vision.patch_size"]
        patches = functional.conv2d(
            pixels[None], self._get("v.patch_embd.weight"), self._find("v.patch_embd.bias"), stride=size
        )
        rows = patches[0].flatten(1).T
        token = self._find("v.class_embd")
        if token is not None:
            rows = torch.cat([token[None], rows])
        rows = rows + self._get("v.position_embd.weight")
        return self._norm("v.pre_ln", rows) if "v.pre_ln.weight" in self._tensors else rows

    def _block(self, name: str, state: torch.Tensor) -> torch.Tensor:
        normed = self._norm(f"{name}.ln1", state)
        heads = self._fields["clip.vision.attention.head_count"]
        query, key, value = (
            self._linear(f"{name}.attn_{letter}", normed).reshape(*normed.shape[:2], heads, -1).transpose(1, 2)
            for letter in "qkv"
        )
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        state = state + self._linear(f"{name}.attn_out", mixed)
        wide = self._linear(f"{name}.ffn_up", self._norm(f"{name}.ln2", state))
        if self._fields["clip.use_gelu"]:
            wide = functional.gelu(wide, approximate="tanh")
        else:
            wide = wide * torch.sigmoid(1.702 * wide)
        return state + self._linear(f"{name}.ffn_down", wide)

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        numbers = sorted(
            int(name.split(".")[1]) for name in self._tensors if name.startswith("mm.") and "weight" in name
        )
        for number in numbers:
            features = self._linear(f"mm.{number}", features)
            if number != numbers[-1]:
                features = functional.gelu(features, approximate="tanh")
        return features

    def _linear(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        return functional.linear(inputs, self._get(f"{name}.weight"), self._get(f"{name}.bias"))

    def _norm(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        epsilon = self._fields["clip.vision.attention.layer_norm_epsilon"]
        weight = self._get(f"{name}.weight")
        return functional.layer_norm(inputs, weight.shape, weight, self._get(f"{name}.bias"), epsilon)

    def _find(self, name: str) -> torch.Tensor | None:
        return self._get(name) if name in self._tensors else None

    def _get(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32))
