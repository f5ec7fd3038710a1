"""Words for a model's visual tokens, without its language model: ``python -m llava_edge.train_gpu.teach_words --help``.

For pictures that a model has to learn to see before it can learn to talk about them: a step takes a fraction of what
one with the language model takes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.train_gpu import build, checkpoint, features
from llava_edge.train_gpu.datagen.picture_sets import Layout, Sample, read_boxes
from llava_edge.train_gpu.model import pool_tokens
from llava_edge.train_gpu.samples import read_json
from llava_edge.train_gpu.words import align_words

log = logging.getLogger(__name__)


@click.command()
@click.argument("init", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--samples", "samples_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
              help="LLaVA samples by source, as prepare_nano writes them.")  # fmt: skip
@click.option("--features", "features_folder", type=click.Path(file_okay=False, path_type=Path), required=True,
              help="Cached features of their pictures; blocks that these leave to be run are trained too.")  # fmt: skip
@click.option("--pictures", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="The pictures' folder: make the cache first, if it isn't there.")  # fmt: skip
@click.option("--tower-blocks", default=4, show_default=True, type=click.IntRange(0),
              help="Last blocks of the tower that a new cache leaves to be trained.")  # fmt: skip
@click.option("--boxes", type=click.Path(exists=True, file_okay=False, path_type=Path), multiple=True,
              help="Folder of drawn pictures with boxes.json; samples name its pictures FOLDER/PICTURE.")  # fmt: skip
@click.option("--keep", multiple=True, metavar="SOURCE",
              help="Samples on whose pictures the visual tokens shall stay near what they are.")  # fmt: skip
@click.option("--keep-weight", default=10.0, show_default=True, type=click.FloatRange(0),
              help="How much that counts beside the words.")  # fmt: skip
@click.option("--image-tokens", default=64, show_default=True, type=click.IntRange(1), help="Tokens of a picture.")
@click.option("--epochs", default=2.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))
@click.option("--lr", default=5e-4, show_default=True, type=click.FloatRange(0), help="The projector's learning rate.")
@click.option("--tower-lr", default=1e-4, show_default=True, type=click.FloatRange(0))
@click.option("--seed", default=1, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The checkpoint's folder.")
def main(
    init: Path,
    samples_file: Path,
    features_folder: Path,
    pictures: Path | None,
    tower_blocks: int,
    boxes: Sequence[Path],
    keep: Sequence[str],
    output: Path,
    **options: Any,
) -> None:
    """Train the projector of the checkpoint INIT, and blocks of its tower, to say the words of the samples' answers.

    Of pictures with boxes.json each visual token learns what it covers. `read_words` tells how often it says so.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(options["seed"])
    try:
        checkpoint.spare_other(output)
        samples = _read_samples(samples_file, keep)
        pictured = [sample for source in samples.values() for sample in source if "image" in sample]
        kept = {sample["image"] for source in keep for sample in samples[source] if "image" in sample}
        layouts = _read_layouts(boxes, {sample["image"] for sample in pictured})
        description = checkpoint.read_description(init)
        model, tokenizer = build.load_model(str(init)), build.load_tokenizer(str(init))
        # a count that the grid can't be pooled to is told before hours of work
        pool_tokens(torch.zeros(1, description["visual_tokens"]["full"], 1), options["image_tokens"])
        if pictures is not None and not (features_folder / "index.json").exists():
            names = sorted({sample["image"] for sample in pictured})
            spec = build.image_spec(description, None)
            features.build_cache(model, spec, pictures, names, features_folder, tower_blocks)
        cache = features.FeatureCache(features_folder)
        align_words(model, cache, pictured, tokenizer, layouts=layouts, keep=kept, **options)
        checkpoint.save_checkpoint(output, model, tokenizer, description)
        build.copy_companions(str(init), output)
    except LlavaEdgeError as error:
        raise click.ClickException(f"{error}\n{error.hint}" if error.hint else str(error)) from None
    log.info("wrote %s", output)


def _read_samples(path: Path, keep: Sequence[str]) -> dict[str, list[Sample]]:
    samples = read_json(path)
    if not isinstance(samples, dict):
        raise InputError(
            f"{path} is a list; expected samples by source",
            hint='Write {"scenes": [...]}, and name the pictures from the folder of --pictures.',
        )
    unknown = set(keep) - set(samples)
    if unknown:
        raise InputError(f"{path} has no source {min(unknown)}; it has {', '.join(samples)}")
    return samples


def _read_layouts(boxes: Sequence[Path], names: set[str]) -> dict[str, Layout]:
    layouts: dict[str, Layout] = {}
    for folder in boxes:
        made = read_boxes(folder)
        if names.isdisjoint(made):
            raise InputError(f"no sample has a picture of {folder}, such as {min(made)}")
        layouts.update(made)
    return layouts


if __name__ == "__main__":
    main()
