"""The trained parts of a LLaVA whose tower is frozen: projector, pooling, language model.

Shapes: B rows, S positions, P patches, F width of the features, D width of the LLM, I image tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from llava_edge.errors import InputError
from llava_edge.train_gpu.data import IGNORE

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from llava_edge.train_gpu.config import LoraConfig
    from llava_edge.train_gpu.data import Batch

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def pool_tokens(embeddings: torch.Tensor, tokens: int) -> torch.Tensor:
    """Average a square grid of embeddings ``[B, P, D]`` down to ``[B, tokens, D]``, row by row."""
    batch, patches, width = embeddings.shape
    if tokens == patches:
        return embeddings
    side, new = int(patches**0.5), int(tokens**0.5)
    if new * new != tokens or side % new:
        raise InputError(f"a grid of {side} x {side} can't be pooled to {tokens} tokens")
    cell = side // new
    grid = embeddings.reshape(batch, new, cell, new, cell, width)
    return grid.mean(dim=(2, 4)).reshape(batch, tokens, width)


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of what may be attended to, as what is added to the attention's logits."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


@torch.no_grad()
def unfold_standardisation(projector: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Make a projector that reads x read (x - mean) / std, without changing what it computes."""
    first = cast(nn.Linear, projector.linear_1)
    first.bias.add_(first.weight @ mean)
    first.weight.mul_(std)


@torch.no_grad()
def fold_standardisation(projector: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Undo :func:`unfold_standardisation`."""
    first = cast(nn.Linear, projector.linear_1)
    first.weight.div_(std)
    first.bias.sub_(first.weight @ mean)


class Trainee(nn.Module):
    """Projector and LLM. The LLM's frozen weights are held in bfloat16, what is trained in float32."""

    def __init__(self, model: LlavaForConditionalGeneration, lora: LoraConfig) -> None:
        super().__init__()
        self.projector = model.model.multi_modal_projector.float().requires_grad_(True)
        self.llm: nn.Module = model.model.language_model.to(torch.bfloat16).requires_grad_(False)
        # At these lengths plain matrix products beat the CPU's fused kernel, whose backward pass took a quarter of
        # the time of a step.
        model.model.language_model.set_attn_implementation("eager")
        self.embed = self.llm.get_input_embeddings()
        self.head = model.lm_head.to(torch.bfloat16).requires_grad_(False)
        if lora.rank:
            self.llm = get_peft_model(
                self.llm,
                PeftLoraConfig(
                    r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=LORA_TARGETS
                ),
            )
            for parameter in self.llm.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        # What reads the features is scaled to unit inputs for the optimiser; see standardise.
        self.feature_shift: torch.Tensor
        self.feature_scale: torch.Tensor
        width = self.projector.linear_1.in_features
        self.register_buffer("feature_shift", torch.zeros(width))
        self.register_buffer("feature_scale", torch.ones(width))

    def standardise(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Take features as (x - mean) / std from here on, without changing what the projector computes."""
        unfold_standardisation(self.projector, mean, std)
        self.feature_shift.copy_(mean)
        self.feature_scale.copy_(std)

    def fold_standardisation(self) -> None:
        """Undo :meth:`standardise`: the projector reads plain features again."""
        fold_standardisation(self.projector, self.feature_shift, self.feature_scale)
        self.feature_shift.zero_()
        self.feature_scale.fill_(1)

    def image_embeddings(self, features: torch.Tensor, tokens: int) -> torch.Tensor:
        """Features ``[B, P, F]`` to what the LLM reads, ``[B, I, D]``."""
        standard = (features.float() - self.feature_shift) / self.feature_scale
        return pool_tokens(self.projector(standard), tokens)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Sum of the cross-entropies of all labels, and their number."""
        embeddings = self.embed(batch.ids)
        image = self.image_embeddings(batch.features, batch.image_tokens).to(embeddings.dtype)
        start, end = batch.image_start, batch.image_start + batch.image_tokens
        embeddings = torch.cat([embeddings[:, :start], image, embeddings[:, end:]], dim=1)
        hidden = self.llm(
            inputs_embeds=embeddings,
            attention_mask=additive(batch.seen, embeddings.dtype),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state  # [B, S, D]
        # Position i predicts i + 1. The first token of an answer follows its own branch, so that no label ever
        # stands behind the last token of another branch.
        counted = batch.labels[:, 1:] != IGNORE
        logits = self.head(hidden[:, :-1][counted])
        loss = functional.cross_entropy(logits.float(), batch.labels[:, 1:][counted], reduction="sum")
        return loss, int(counted.sum())

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Everything that the optimiser moves, by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


def merge_into(trainee: Trainee, model: LlavaForConditionalGeneration) -> None:
    """Write the trained projector and the merged adapters into a float32 model."""
    trainee.fold_standardisation()
    model.model.multi_modal_projector.load_state_dict(trainee.projector.state_dict())
    if not isinstance(trainee.llm, PeftModel):
        return
    plain = dict(model.model.language_model.named_modules())
    for name, module in trainee.llm.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            delta = module.lora_B["default"].weight @ module.lora_A["default"].weight
            with torch.no_grad():
                plain[name].weight.add_(delta.float() * module.scaling["default"])
