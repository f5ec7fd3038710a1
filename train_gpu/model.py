"""What is trained: projector, language model or adapters on it, and perhaps the last blocks of the vision tower; or the
norms of a language model that was rounded, for it to say what it said before.

Shapes: B rows, S positions, N pictures, P patches, F width of the features, D width of the LLM, I image tokens.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

from llava_edge.bundle import resolve_model
from llava_edge.errors import InputError
from llava_edge.train_gpu.drawing import draw_answers
from llava_edge.train_gpu.features import through_blocks, tower_features, used_blocks
from llava_edge.train_gpu.parts import llm_from_gguf
from llava_edge.train_gpu.precision import uses_bfloat16
from llava_edge.train_gpu.prompts import IGNORE

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from llava_edge.train_gpu.config import Recipe, ScaleConfig
    from llava_edge.train_gpu.rows import Batch

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


def divergences(taught: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergences of logits ``[N, V]`` from those that were taught, ``[N]``, in nats."""
    wanted, found = functional.log_softmax(taught, -1), functional.log_softmax(said, -1)
    return functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of what may be attended to, as what is added to the attention's logits."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


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
    """The model as it is trained. What is trained is held in float32, the rest in the precision of the computation.

    Parameters
    ----------
    model
        It is taken apart and changed in place.
    recipe
        Its stage, adapters, tower blocks and precision.
    live_tower
        Whether pictures come as pixels.
    blocks
        How many of the tower's last blocks cached features still have to pass. Without them and without pixels the
        tower isn't kept.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, recipe: Recipe, *, live_tower: bool, blocks: int = 0
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.config = model.config
        self.image_token: int = model.config.image_token_id
        self.bf16 = uses_bfloat16(recipe.scale)
        self.attention = attention_of(recipe.scale)
        model.model.language_model.set_attn_implementation(self.attention)
        model.requires_grad_(False).to(torch.bfloat16 if self.bf16 else torch.float32)
        self.projector = model.model.multi_modal_projector
        self.tower: nn.Module | None = model.model.vision_tower if live_tower or blocks else None
        self.llm: nn.Module = model.model.language_model
        self.embed = self.llm.get_input_embeddings()
        self.head = model.lm_head
        self.teacher = self._take_rounded(recipe.rounded) if recipe.rounded is not None else None
        self._choose(recipe)
        if recipe.scale.gradient_checkpointing:
            enable = getattr(self.llm, "activation_checkpointing_enable", None)  # its name since transformers 5.20
            (enable or self.llm.gradient_checkpointing_enable)({"use_reentrant": False})
        # What reads the features is scaled to unit inputs for the optimiser; see standardise.
        self.feature_shift: torch.Tensor
        self.feature_scale: torch.Tensor
        width = self.projector.linear_1.in_features
        self.register_buffer("feature_shift", torch.zeros(width))
        self.register_buffer("feature_scale", torch.ones(width))

    def _take_rounded(self, bundle: str) -> nn.ModuleList:
        """Put a bundle's quantised language model in place of the exact one, which is returned with its head."""
        exact = nn.ModuleList(copy.deepcopy([self.llm, self.head]))
        rounded, _ = llm_from_gguf(resolve_model(bundle).file("llm"))
        try:
            self.llm.load_state_dict(rounded.get_decoder().state_dict())
            self.head.load_state_dict(rounded.get_output_embeddings().state_dict())
        except RuntimeError:
            raise InputError(
                f"{bundle} has a language model of another shape", hint="Name a bundle that was made of init."
            ) from None
        return exact

    def _choose(self, recipe: Recipe) -> None:
        """Mark what is trained and bring it to float32."""
        self.projector.float().requires_grad_(recipe.stage != "norms")  # it may be scaled, which needs the precision
        if self.config.projector_hidden_act == "linear":  # one matrix: the second is the identity and stays it
            self.projector.linear_2.requires_grad_(False)
        if recipe.stage == "finetune" and recipe.lora.rank:
            options = PeftLoraConfig(
                r=recipe.lora.rank,
                lora_alpha=recipe.lora.alpha,
                lora_dropout=recipe.lora.dropout,
                target_modules=LORA_TARGETS,
            )
            self.llm = get_peft_model(self.llm, options)
            if self.bf16:  # peft would cast what adapters read to float32, for autocast to cast it back
                for module in self.llm.modules():
                    if isinstance(module, LoraLayer):
                        module.cast_input_dtype_enabled = False
        elif recipe.stage == "finetune":
            self.llm.requires_grad_(True)
            self.head.requires_grad_(True)
        elif recipe.stage == "norms":
            for name, parameter in self.llm.named_parameters():
                parameter.requires_grad_(name.endswith("norm.weight"))
        if recipe.model.tower_blocks and self.tower is not None:
            if self.attention == "eager":  # the tower's own may be the fused kernel, whose backward is slow on a CPU
                cast(Any, self.tower).set_attn_implementation("eager")
            for block in used_blocks(self.tower, self.config)[-recipe.model.tower_blocks :]:
                block.requires_grad_(True)
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def train(self, mode: bool = True) -> Trainee:
        """Training mode; a tower that is frozen, and a teacher, stay as they are used later."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        if self.tower is not None and not any(p.requires_grad for p in self.tower.parameters()):
            self.tower.eval()
        return self

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
        """Features ``[N, P, F]`` to what the LLM reads, ``[N, I, D]``."""
        standard = (features.float() - self.feature_shift) / self.feature_scale
        return pool_tokens(self.projector(standard), tokens)

    def _features(self, batch: Batch) -> torch.Tensor:
        if batch.are_features and not self.blocks:
            return batch.pictures
        if self.tower is None:
            raise InputError("the batch has pixels, and the vision tower was left out")
        pictures = batch.pictures.to(next(self.tower.parameters()).dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in self.tower.parameters())):
            if batch.are_features:
                return through_blocks(self.tower, self.config, pictures, self.blocks)
            return tower_features(self.tower, self.config, pictures)

    def forward(self, batch: Batch, *, predict: bool = False) -> torch.Tensor:
        """Weighted sum of the labels' cross-entropies, or of the divergences from the teacher where the labels are;
        with ``predict`` the last token's logits, ``[B, V]``.
        """
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings, extra = self._embeddings(batch)
            hidden = self._read(self.llm, embeddings, batch)
            if predict:
                return self.head(hidden[:, -1]).float()  # type: ignore[no-any-return]
            # Position i predicts i + 1. The first token of a document or of an answer's branch is never labelled, so
            # no label stands behind the last token of another.
            counted = batch.labels[:, 1:] != IGNORE
            logits = self.head(hidden[:, :-1][counted]).float() / batch.temperature
            if self.teacher is None:
                losses = functional.cross_entropy(logits, batch.labels[:, 1:][counted], reduction="none")
            else:
                losses = divergences(self._taught(batch, embeddings, counted), logits)
            loss = (losses * batch.weights[:, 1:][counted]).sum()
        return loss + extra

    def _read(self, llm: nn.Module, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        """A language model's last hidden states ``[B, S, D]``."""
        outputs = llm(
            inputs_embeds=embeddings,
            attention_mask=self._mask(batch, embeddings.dtype),
            position_ids=batch.positions,
            use_cache=False,
        )
        return outputs.last_hidden_state  # type: ignore[no-any-return]

    @torch.no_grad()
    def _taught(self, batch: Batch, embeddings: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """The exact model's logits ``[labels, V]``, of the same pictures and its own words."""
        assert self.teacher is not None
        llm: Any
        llm, head = self.teacher
        words = llm.get_input_embeddings()(batch.ids)
        own = torch.where(self._pictured(batch), embeddings, words)
        return head(self._read(llm, own, batch)[:, :-1][counted]).float()  # type: ignore[no-any-return]

    def _pictured(self, batch: Batch) -> torch.Tensor:
        """Where visual tokens stand, ``[B, S, 1]``."""
        return ((batch.ids == self.image_token) & (batch.documents > 0))[..., None]

    def _embeddings(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | float]:
        """What the LLM reads ``[B, S, D]``, and a zero that ties unused parts to the loss."""
        embeddings = self.embed(batch.ids)
        image = self.image_embeddings(self._features(batch), batch.image_tokens).to(embeddings.dtype)
        extra: torch.Tensor | float = 0.0
        if batch.n_pictures:
            embeddings = embeddings.masked_scatter(self._pictured(batch), image)
        else:
            extra = 0.0 * image.float().sum()  # processes that share the work wait for every gradient
        return embeddings, extra

    @torch.no_grad()
    def draw(self, batch: Batch, count: int, **options: Any) -> list[list[list[int]]]:
        """Random answers to each row of a batch, all of one length; see :func:`drawing.draw_answers`."""
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=self.bf16):
            return draw_answers(self.llm, self.head, self._embeddings(batch)[0], count, **options)

    def _mask(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor | None:
        if self.attention == "flash_attention_2":
            return None  # it finds the documents of a row by their positions
        seen = batch.seen()
        return additive(seen, dtype) if self.attention == "eager" else seen

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Everything that the optimiser moves, by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


def attention_of(scale: ScaleConfig) -> str:
    """The attention of the LLM: "auto" is plain matrix products on a CPU, whose fused kernel has a slow backward."""
    if scale.attention != "auto":
        return scale.attention
    return "sdpa" if torch.cuda.is_available() else "eager"


def merge_into(trainee: Trainee, model: LlavaForConditionalGeneration) -> None:
    """Write what was trained into a model: projector, tower blocks, LLM or merged adapters. The rest stays as it is."""
    trainee.fold_standardisation()
    model.model.multi_modal_projector.load_state_dict(trainee.projector.state_dict())
    with torch.no_grad():
        if trainee.tower is not None:
            _copy_trained(trainee.tower, model.model.vision_tower)
        if isinstance(trainee.llm, PeftModel):
            _merge_adapters(trainee.llm, model.model.language_model)
        else:
            _copy_trained(trainee.llm, model.model.language_model)
            _copy_trained(trainee.head, model.lm_head)


def _copy_trained(source: nn.Module, target: nn.Module) -> None:
    places = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        if parameter.requires_grad:
            places[name].copy_(parameter)


def _merge_adapters(llm: PeftModel, target: nn.Module) -> None:
    plain = dict(target.named_modules())
    for name, module in llm.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            weight = plain[name].weight  # on the CPU, while the adapters may be on a GPU
            delta = (module.lora_B["default"].weight @ module.lora_A["default"].weight).to(weight.device)
            weight.copy_(weight.float() + delta.float() * module.scaling["default"])
