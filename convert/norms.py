"""Norms that were tuned for rounded matrices, from a checkpoint of stage ``norms`` into a quantised GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gguf

from llava_edge.convert.checkpoint import open_checkpoint
from llava_edge.convert.llm import norm_tensors
from llava_edge.errors import InputError

if TYPE_CHECKING:
    from llava_edge.convert.checkpoint import Checkpoint


def open_tuned(directory: Path, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with norms for another one; InputError if it is none, or one of a model of another shape."""
    tuned = open_checkpoint(directory)
    if norm_tensors(tuned.text_config) != norm_tensors(checkpoint.text_config):
        raise InputError(
            f"{directory} has a language model of another shape than {checkpoint.directory}",
            hint="Take what a recipe of stage norms has made of this checkpoint.",
        )
    return tuned


def set_norms(path: Path, tuned: Checkpoint) -> None:
    """Put a checkpoint's norms in place of those in a language model's GGUF."""
    weights, names = tuned.open_weights(), norm_tensors(tuned.text_config)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "r+").tensors}
    for target, (name, shape) in names.items():
        weights.check_shape(name, shape)
        tensors[target].data[:] = weights.take(name)
    next(iter(tensors.values())).data.flush()
