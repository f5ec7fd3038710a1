"""The reference that every written file is measured against: the checkpoint in transformers, float32, on the CPU.

Shapes: T tokens, P patches, D width of the language model, V size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from llava_edge.errors import InputError
from llava_edge.images import normalize

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from llava_edge.convert.checkpoint import Checkpoint


class Reference:
    """A checkpoint loaded by transformers. InputError if a tensor is missing: it would be made up at random."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        try:
            with _no_progress_bar():
                model, report = transformers.LlavaForConditionalGeneration.from_pretrained(
                    checkpoint.directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
                )
        except (RuntimeError, OSError, ValueError) as error:
            raise InputError(f"transformers can't load {checkpoint.directory}: {error}") from None
        wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}
        if wrong:
            raise InputError(f"the checkpoint's tensors don't fit its config.json: {wrong}")
        self.model = model.eval()

    @property
    def versions(self) -> str:
        """What computed the reference."""
        return f"transformers {transformers.__version__}, torch {torch.__version__}, float32"

    @torch.inference_mode()
    def encode(self, picture: Image.Image) -> NDArray[np.float32]:
        """Embeddings ``[P, D]`` of an RGB picture of the tower's size, the class token hidden from every patch."""
        parts = self.model.model
        pixels = torch.from_numpy(normalize(picture, self._checkpoint.description.image))[None]
        mask = torch.ones(1, self._checkpoint.description.visual_tokens.full + 1, dtype=torch.long)
        mask[:, 0] = 0
        states = parts.vision_tower(pixels, attention_mask=mask, output_hidden_states=True).hidden_states
        features = torch.cat([states[layer][0, 1:] for layer in self._checkpoint.feature_layers], dim=-1)
        embeddings: NDArray[np.float32] = parts.multi_modal_projector(features).numpy()
        return embeddings

    @torch.inference_mode()
    def answer(
        self, before: list[int], picture: NDArray[np.float32], after: list[int], length: int
    ) -> tuple[list[int], NDArray[np.float32]]:
        """The greedy answer to a prompt with a picture's embeddings in it, up to its end or ``length`` tokens.

        Returns its tokens and the logits ``[T, V]`` from which each of them was chosen.
        """
        embed = self.model.get_input_embeddings()
        rows = [embed(torch.tensor(before)), torch.from_numpy(picture), embed(torch.tensor(after))]
        step = torch.cat(rows)[None]
        ends = _end_tokens(self.model)
        tokens: list[int] = []
        logits: list[NDArray[np.float32]] = []
        cache: Any = None
        while len(tokens) < length and not (tokens and tokens[-1] in ends):
            output = self.model.model.language_model(inputs_embeds=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(self.model.lm_head(output.last_hidden_state[0, -1]).numpy())
            tokens.append(int(logits[-1].argmax()))
            step = embed(torch.tensor(tokens[-1:]))[None]
        return tokens, np.stack(logits)


def load_tokenizer(directory: Path) -> transformers.PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; nothing in the checkpoint is run."""
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"can't read the tokenizer of {directory}: {error}") from None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    switch = transformers.utils.logging
    shown = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            switch.enable_progress_bar()


def _end_tokens(model: Any) -> set[int]:
    found = model.config.text_config.eos_token_id
    return set(found) if isinstance(found, list) else {found}
