"""The reference that every written file is measured against: transformers' modules in float32 on the CPU.

The vision tower is loaded whole, the language model one layer at a time from disk, so that a model of any size is
measured with the memory of one layer. The tests compare this with transformers' own LLaVA classes.

Shapes: T tokens, P patches, D width of the language model, V size of the vocabulary, W width of the tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from llava_edge.convert.memory import release
from llava_edge.convert.projector import projector_layers
from llava_edge.errors import InputError
from llava_edge.images import normalize

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from llava_edge.convert.checkpoint import Checkpoint
    from llava_edge.convert.weights import Weights


@dataclass(frozen=True)
class Prompt:
    """Rows ``[T, D]`` that several continuations share, which don't see each other, and these."""

    start: NDArray[np.float32]
    branches: list[NDArray[np.float32]]

    @property
    def rows(self) -> torch.Tensor:
        """``[1, T, D]``: the start, then branch by branch."""
        return torch.from_numpy(np.concatenate([self.start, *self.branches]))[None]

    @property
    def places(self) -> torch.Tensor:
        """Positions ``[1, T]``: every branch goes on where the start ends."""
        begin = len(self.start)
        parts = [torch.arange(begin), *(torch.arange(begin, begin + len(branch)) for branch in self.branches)]
        return torch.cat(parts)[None]

    @property
    def mask(self) -> torch.Tensor:
        """``[1, 1, T, T]``: whether a row sees another."""
        owner = torch.cat([torch.zeros(len(rows)) + n for n, rows in enumerate((self.start, *self.branches))])
        seen = (owner[:, None] == owner[None]) | (owner[None] == 0)
        return (seen & torch.ones_like(seen).tril())[None, None]

    def ends(self) -> Iterator[int]:
        """Where each branch ends."""
        end = len(self.start)
        for branch in self.branches:
            end += len(branch)
            yield end


class Reference:
    """A checkpoint, computed from its own tensors. InputError if one is missing: it would be made up at random."""

    def __init__(self, checkpoint: Checkpoint, weights: Weights) -> None:
        self._checkpoint = checkpoint
        self._weights = weights
        self._tower: Any = None

    @property
    def versions(self) -> str:
        """What computed the reference."""
        return f"transformers {transformers.__version__}, torch {torch.__version__}, float32"

    @torch.inference_mode()
    def encode(self, picture: Image.Image) -> NDArray[np.float32]:
        """Embeddings ``[P, D]`` of an RGB picture of the tower's size."""
        states = self.hidden_states(picture)
        skipped = int(self._checkpoint.tower.family != "siglip")
        features = torch.cat([states[layer][skipped:] for layer in self._checkpoint.feature_layers], dim=-1)
        layers = list(projector_layers(self._checkpoint.projector, self._weights))
        for number, (weight, bias) in enumerate(layers):
            features = functional.linear(features, torch.from_numpy(weight.load()), torch.from_numpy(bias.load()))
            if number < len(layers) - 1:
                features = functional.gelu(features)
        embeddings: NDArray[np.float32] = features.numpy()
        return embeddings

    @torch.inference_mode()
    def hidden_states(self, picture: Image.Image) -> list[torch.Tensor]:
        """Hidden states ``[T, W]`` of the tower; 0 is the input of the first block."""
        if self._tower is None:
            self._tower = self._load_tower()
        tower = self._checkpoint.tower
        pixels = torch.from_numpy(normalize(picture, self._checkpoint.description.image))[None]
        mask: dict[str, torch.Tensor] = {}
        if tower.family != "siglip" and not tower.class_token:
            # The token is there, and no patch sees it.
            hidden = torch.ones(1, tower.patches + 1, dtype=torch.long)
            hidden[:, 0] = 0
            mask["attention_mask"] = hidden
        return [state[0] for state in self._tower(pixels, output_hidden_states=True, **mask).hidden_states]

    def release_tower(self) -> None:
        """Give back the tower's memory."""
        self._tower = None
        release()

    def newline(self) -> NDArray[np.float32]:
        """The row end ``[D]`` of pictures in tiles."""
        return self._weights.take("image_newline")

    def embed(self, tokens: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Word embeddings ``[T, D]`` of several runs of tokens."""
        table = self._weights.take("language_model.embed_tokens.weight")
        return [table[list(run)] for run in tokens]

    @torch.inference_mode()
    def logits(
        self, prompts: Sequence[Prompt], counts: Sequence[int], tell: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.float32]]:
        """Logits ``[count, V]`` after the last ``count`` rows of every branch of several prompts.

        ``tell`` is told how many layers are done, of how many.
        """
        total = self._checkpoint.text_config.num_hidden_layers
        states = self._run(prompts, None if tell is None else lambda done, _states: tell(done, total))
        head = "language_model.embed_tokens.weight" if self._checkpoint.tied else "lm_head.weight"
        matrix = torch.from_numpy(self._weights.take(head))
        ends = [(state[0], end) for state, prompt in zip(states, prompts, strict=True) for end in prompt.ends()]
        return [(rows[end - n : end] @ matrix.T).numpy() for (rows, end), n in zip(ends, counts, strict=True)]

    @torch.inference_mode()
    def layer_outputs(self, rows: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """What each layer makes of one input ``[T, D]``."""
        found: list[NDArray[np.float32]] = []
        self._run([Prompt(rows, [])], lambda _done, states: found.append(states[0][0].numpy().copy()))
        return found

    def _run(
        self, prompts: Sequence[Prompt], visit: Callable[[int, list[torch.Tensor]], object] | None = None
    ) -> list[torch.Tensor]:
        """Send prompts through all layers together: the model is read once. Returns states ``[1, T, D]``.

        ``visit`` gets the number of layers that are done, and the states behind the last of them.
        """
        config = self._checkpoint.text_config
        with torch.device("meta"):
            kind: Any = transformers.AutoModelForCausalLM
            skeleton = kind.from_config(config, attn_implementation="sdpa").model
        rotary = type(skeleton.rotary_emb)(config)
        states, places = [prompt.rows for prompt in prompts], [prompt.places for prompt in prompts]
        masks = [prompt.mask for prompt in prompts]
        angles = [rotary(state, place) for state, place in zip(states, places, strict=True)]
        for done, layer in enumerate(skeleton.layers, 1):
            self._fill(layer, f"language_model.layers.{done - 1}.")
            layer.eval()
            states = [
                _first(layer(state, attention_mask=mask, position_ids=place, position_embeddings=angle))
                for state, mask, place, angle in zip(states, masks, places, angles, strict=True)
            ]
            layer.to("meta")
            if done % 4 == 0:
                release()  # what glibc keeps of each layer would add up
            if visit:
                visit(done, states)
        self._fill(skeleton.norm, "language_model.norm.")
        return [skeleton.norm(state) for state in states]

    def _fill(self, module: torch.nn.Module, prefix: str) -> None:
        names = [name for name, _ in module.named_parameters()]
        state = {name: torch.from_numpy(self._weights.take(prefix + name)) for name in names}
        module.load_state_dict(state, strict=True, assign=True)

    def _load_tower(self) -> Any:
        """The tower, by the names that checkpoints on disk use; transformers renames them to its present ones."""
        tower = self._checkpoint.tower
        prefix = "vision_tower."
        state = {
            name.removeprefix(prefix): torch.from_numpy(self._weights.take(name))
            for name in self._weights.names(prefix)
        }
        kind = type(transformers.AutoModel.from_config(_tiny(tower.config)))
        with _quiet():
            model, report = kind.from_pretrained(None, config=tower.config, state_dict=state, output_loading_info=True)
        unused = {
            name for name in report["unexpected_keys"] if not name.startswith(("head.", "embeddings.position_ids"))
        }
        missing = {name for name in report["missing_keys"] if not name.startswith(("post_layernorm", "head."))}
        if unused or missing or report["mismatched_keys"]:
            wrong = sorted(map(str, unused | missing | set(report["mismatched_keys"])))
            raise InputError(f"the tensors of the vision tower don't fit its configuration, first {wrong[0]}")
        return model.eval()


def _tiny(config: Any) -> Any:
    """The same kind of configuration with almost nothing in it, to learn the class of the model."""
    return type(config)(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8)


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no report on tensors, which is read here."""
    switch = transformers.utils.logging
    shown, level = switch.is_progress_bar_enabled(), switch.get_verbosity()
    switch.disable_progress_bar()
    switch.set_verbosity_error()
    try:
        yield
    finally:
        switch.set_verbosity(level)
        if shown:
            switch.enable_progress_bar()
