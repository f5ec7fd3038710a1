"""What a checkpoint's visual tokens say, without its language model: ``python -m llava_edge.train_gpu.read_words``.

On drawn pictures whose layout is known: does the token behind a thing lie nearest to the word for it, to its colour,
and each token to the words of its place? How near a word is to a token is told against all other tokens, since some
words are near to every one.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from llava_edge.errors import LlavaEdgeError
from llava_edge.train_gpu import build, checkpoint, features
from llava_edge.train_gpu.datagen.picture_sets import read_boxes
from llava_edge.train_gpu.model import pool_tokens
from llava_edge.train_gpu.words import PLACES, cell_words, common_directions, place_words, word_pieces

COVERED = 0.6
"""The share of a token's cell that a thing covers at least for the token to be asked for it."""


class Tokens:
    """Visual tokens of some pictures, and how near words are to them.

    Parameters
    ----------
    tokens
        By picture, ``[I, D]``.
    embeddings
        The language model's, ``[V, D]``.
    tokenizer
        The language model's.
    """

    def __init__(self, tokens: Mapping[str, torch.Tensor], embeddings: torch.Tensor, tokenizer: Any) -> None:
        stacked = torch.stack(list(tokens.values()))
        common = common_directions(stacked)
        self._centred = stacked - stacked.mean(dim=(0, 1))
        self._embeddings = embeddings - embeddings @ common.T @ common
        self._tokenizer = tokenizer
        self._row = {name: row for row, name in enumerate(tokens)}

    def nearest(self, words: Sequence[str]) -> dict[str, list[str]]:
        """Which of some words is nearest to each token of each picture."""
        pieces = [word_pieces(self._tokenizer, word) for word in words]
        near = torch.stack([(self._centred @ self._embeddings[ids].T).mean(-1) for ids in pieces], dim=-1)
        near = (near - near.mean(dim=(0, 1))) / near.std(dim=(0, 1))  # [N, I, words]
        return {name: [words[best] for best in near[row].argmax(-1).tolist()] for name, row in self._row.items()}


def shares_right(tokens: Tokens, layouts: Mapping[str, Mapping[str, Any]], side: int) -> dict[str, dict[str, float]]:
    """By what is asked for: how many tokens were, and the share of them that say it."""
    things = [thing for layout in layouts.values() for thing in layout["things"]]
    found = {}
    for key in ("noun", "colour"):
        words = sorted({thing[key] for thing in things if thing[key]})
        if words:
            nearest = tokens.nearest(words)
            right = [
                nearest[name][cell] == word
                for name, layout in layouts.items()
                for cell, shown in enumerate(cell_words(layout, side))
                for word in {thing[key] for thing in layout["things"]} - {None}
                if shown.get(word, 0) >= COVERED
            ]
            found[key] = {"tokens": len(right), "words": len(words), "right": sum(right) / max(1, len(right))}
    nearest = tokens.nearest(PLACES)
    said = [word in place for name in nearest for word, place in zip(nearest[name], place_words(side), strict=True)]
    found["place"] = {"tokens": len(said), "words": len(PLACES), "right": sum(said) / max(1, len(said))}
    return found


@click.command()
@click.argument("name", metavar="CHECKPOINT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--image-tokens", default=64, show_default=True, type=click.IntRange(1), help="Tokens of a picture.")
def main(name: Path, folder: Path, image_tokens: int) -> None:
    """Print how often CHECKPOINT's visual tokens say what FOLDER's boxes.json says that they cover, as JSON."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        layouts = read_boxes(folder)
        model, tokenizer = build.load_model(str(name)).float(), build.load_tokenizer(str(name))
        spec = build.image_spec(checkpoint.read_description(name), None)
        with tempfile.TemporaryDirectory() as work:
            cache = features.build_cache(model, spec, folder.parent, list(layouts), Path(work))
            tokens = {}
            for picture in layouts:
                with torch.inference_mode():
                    states = torch.from_numpy(np.float32(cache[picture]))[None]
                    tokens[picture] = pool_tokens(model.model.multi_modal_projector(states), image_tokens)[0]
            embeddings = model.get_input_embeddings().weight.detach()
            found = shares_right(Tokens(tokens, embeddings, tokenizer), layouts, int(image_tokens**0.5))
    except LlavaEdgeError as error:
        raise click.ClickException(f"{error}\n{error.hint}" if error.hint else str(error)) from None
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
