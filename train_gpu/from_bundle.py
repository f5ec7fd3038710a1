"""A checkpoint to train on from a bundle that was shipped: ``python -m llava_edge.train_gpu.from_bundle --help``.

Bundles hold quantised GGUF files, which nothing can train. Here their values become a LLaVA checkpoint again, for a
further stage on somebody's own pictures, or as the full-precision reference of a bundle whose checkpoint is gone. The
values lie on the grid of the bundle's type: what a short training changes is less than half a step of it, and is lost
if the result is quantised to the same type again, so take Q8_0 for it, or give ``--off-grid`` or ``--base``.

``--off-grid`` scales each channel by a factor of its own and divides by it where the channel is read. The model
computes what it did, on values that no grid has in common.

With the checkpoint that a LoRA was trained on, most of what quantisation did to the language model can be undone: what
LoRA changed in a matrix has a low rank, and the rounding, which has none, is seen in the singular values beyond it.
That needs a low rank: of nano's eighth edition, which many LoRAs made, it takes away more than the rounding.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from llava_edge.bundle import MANIFEST_NAME, Bundle, resolve_model
from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.train_gpu import checkpoint, parts
from llava_edge.train_gpu.build import load_model

log = logging.getLogger(__name__)

_BLOCK = {
    "ln1": "norm1",
    "attn_q": "attention.attention.query",
    "attn_k": "attention.attention.key",
    "attn_v": "attention.attention.value",
    "attn_out": "attention.output.dense",
    "ln2": "norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
"""Modules of a block by their names in an mmproj, and in checkpoints of DINOv2 on disk."""


def model_from_bundle(bundle: Bundle) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    """Model in float32 and tokenizer of a bundle with a DINOv2 tower without class token, as nano has it.

    Raises
    ------
    InputError
        The bundle is of another make.
    """
    reader = gguf.GGUFReader(bundle.file("mmproj"))
    tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    tower = _tower(reader, tensors, bundle.manifest.image.size)
    llm, tokenizer = parts.llm_from_gguf(bundle.file("llm"))
    model = parts.assemble(tower, llm, tokenizer, bundle.manifest.feature_layers)
    projector = {
        f"linear_{number}.{part}": tensors[f"mm.{place}.{part}"]
        for number, place in ((1, 0), (2, 2))
        for part in ("weight", "bias")
    }
    model.model.multi_modal_projector.load_state_dict(projector)
    return model, tokenizer


@torch.no_grad()
def undo_rounding(model: LlavaForConditionalGeneration, base: LlavaForConditionalGeneration, rank: int) -> float:
    """Put ``base``, and what LoRA of at most ``rank`` changed in it, in place of the quantised language model.

    Singular values of the difference are shrunk as is best for a matrix in white noise (Gavish and Donoho, Optimal
    Shrinkage of Singular Values, 2017, Frobenius loss); the noise is what the difference has beyond ``rank``.

    Returns
    -------
    float
        The mean rank of what was kept.

    Raises
    ------
    InputError
        ``base`` has a language model of another shape.
    """
    old, new = base.model.language_model.state_dict(), model.model.language_model.state_dict()
    if {name: t.shape for name, t in old.items()} != {name: t.shape for name, t in new.items()}:
        raise InputError(
            "the base's language model has another shape", hint="Give the one that the LoRA was trained on."
        )
    ranks = []
    for name, matrix in old.items():
        if name.endswith("_proj.weight"):
            u, values, v = torch.linalg.svd((new[name] - matrix).float(), full_matrices=False)
            if len(values) <= rank:
                raise InputError(f"{name} has rank {len(values)}: a LoRA of rank {rank} leaves no rounding to measure")
            free = (matrix.shape[0] - rank) * (matrix.shape[1] - rank)
            noise = float(values[rank:].norm()) * (max(matrix.shape) / free) ** 0.5
            shrunk = _shrink(values[:rank], noise, min(matrix.shape) / max(matrix.shape))
            ranks.append(int((shrunk > 0).sum()))
            matrix += (u[:, :rank] * shrunk) @ v[:rank]
    model.model.language_model.load_state_dict(old)
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    return float(np.mean(ranks))


def _shrink(values: torch.Tensor, noise: float, aspect: float) -> torch.Tensor:
    """Singular values ``[R]`` without noise of this size: an element's, times the root of the longer side."""
    y = values / noise
    inside = ((y**2 - aspect - 1) ** 2 - 4 * aspect).clamp(min=0)
    return torch.where(y > 1 + aspect**0.5, noise * inside.sqrt() / y, 0.0)


@torch.no_grad()
def leave_grid(llm: Any, width: float, seed: int = 0) -> None:
    """Scale the channels of a language model by factors from ``exp(-width)`` to ``exp(width)``, drawn at random.

    What writes a channel is multiplied and what reads it divided: norms before attention and before the MLP, values
    before the output projection, and ``up`` before ``down``. So all columns of every matrix get factors of their own.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> torch.Tensor:
        return torch.exp(width * (2 * torch.rand(count, generator=generator) - 1))

    for layer in llm.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = factors(len(norm.weight))
            norm.weight.mul_(scale)
            for reader in readers:
                reader.weight.div_(scale)
        scale = factors(len(mlp.up_proj.weight))
        mlp.up_proj.weight.mul_(scale[:, None])
        mlp.down_proj.weight.div_(scale)
        scale = factors(len(attention.v_proj.weight))
        attention.v_proj.weight.mul_(scale[:, None])
        heads = scale.reshape(-1, attention.head_dim).repeat_interleave(attention.num_key_value_groups, dim=0)
        attention.o_proj.weight.div_(heads.flatten())


def _tower(reader: gguf.GGUFReader, tensors: dict[str, torch.Tensor], image_size: int) -> Dinov2Model:
    def key(name: str) -> Any:
        field = reader.get_field(name)
        return None if field is None else field.contents()

    table = tensors.get("v.position_embd.weight")
    patch = key("clip.vision.patch_size")
    projector = {"mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias"}
    found = {name for name in tensors if name.startswith("mm.")}
    if table is None or len(table) != (image_size // patch) ** 2 or found != projector:
        raise InputError(
            "the bundle has a class token in its tower, or another projector than an MLP of two layers",
            hint="Only bundles like nano's can be turned back; take the checkpoint that this one was made from.",
        )
    width = key("clip.vision.embedding_length")
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=key("clip.vision.block_count"),
        num_attention_heads=key("clip.vision.attention.head_count"),
        mlp_ratio=key("clip.vision.feed_forward_length") // width,
        image_size=image_size,
        patch_size=patch,
        layer_norm_eps=float(np.float32(key("clip.vision.attention.layer_norm_epsilon"))),
        use_mask_token=False,
    )
    state = {
        "embeddings.cls_token": torch.zeros(1, 1, width),  # hidden from the patches
        "embeddings.position_embeddings": torch.cat([torch.zeros(1, width), table])[None],
        "embeddings.patch_embeddings.projection.weight": tensors["v.patch_embd.weight"],
        "embeddings.patch_embeddings.projection.bias": tensors["v.patch_embd.bias"],
        "layernorm.weight": torch.ones(width),  # behind the last feature layer
        "layernorm.bias": torch.zeros(width),
    }
    for number in range(config.num_hidden_layers):
        for short, module in _BLOCK.items():
            for part in ("weight", "bias"):
                state[f"encoder.layer.{number}.{module}.{part}"] = tensors[f"v.blk.{number}.{short}.{part}"]
        for scale in ("layer_scale1", "layer_scale2"):  # folded into the matrices before them
            state[f"encoder.layer.{number}.{scale}.lambda1"] = torch.ones(width)
    return parts.tower_from_state(config, state)


@click.command()
@click.argument("name", metavar="BUNDLE")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The checkpoint's folder.")
@click.option(
    "--base",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The checkpoint that LoRA was trained on: undo most of the language model's rounding.",
)
@click.option(
    "--lora-rank",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="The sum of the LoRAs' ranks, for --base.",
)
@click.option(
    "--off-grid",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Scale channels by up to exp(this), for a model that will be quantised to the same type again; 0.25 does.",
)
def main(name: str, output: Path, base: Path | None, lora_rank: int, off_grid: float) -> None:
    """Write BUNDLE, a model's name or a folder, as a checkpoint that `llava-edge train` and `convert` take."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        bundle = resolve_model(name)
        model, tokenizer = model_from_bundle(bundle)
        if base is not None:
            kept_rank = undo_rounding(model, load_model(str(base)).float(), lora_rank)
            log.info("what training changed has rank %.0f on average", kept_rank)
        if off_grid:
            leave_grid(model.model.language_model, off_grid)
    except LlavaEdgeError as error:
        raise click.ClickException(f"{error}\n{error.hint}" if error.hint else str(error)) from None
    manifest = json.loads((bundle.directory / MANIFEST_NAME).read_text())
    kept = ("name", "family", "license", "source", "image", "visual_tokens", "prompt")
    checkpoint.save_checkpoint(output, model, tokenizer, {name: manifest[name] for name in kept})
    log.info("wrote %s", output)


if __name__ == "__main__":
    main()
