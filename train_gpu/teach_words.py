"""Words for a model's visual tokens, without its language model: ``python -m llava_edge.train_gpu.teach_words --help``.

For data that a model has to learn to see before it can learn to talk about it: a step takes a fraction of what one with
the language model takes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from llava_edge.errors import LlavaEdgeError
from llava_edge.train_gpu import build, checkpoint, features
from llava_edge.train_gpu.datagen.picture_sets import read_boxes
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
              help="Folder of drawn pictures with boxes.json, as samples name it: PICTURES/scenes.")  # fmt: skip
@click.option("--keep", multiple=True, metavar="SOURCE",
              help="Samples on whose pictures the visual tokens shall stay near what they are.")  # fmt: skip
@click.option("--keep-weight", default=10.0, show_default=True, help="How much that counts beside the words.")
@click.option("--image-tokens", default=64, show_default=True)
@click.option("--epochs", default=2.0, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--lr", default=5e-4, show_default=True, help="The projector's learning rate.")
@click.option("--tower-lr", default=1e-4, show_default=True)
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
    """Train INIT's projector, and blocks of its tower, to say the words of SAMPLES; see :mod:`train_gpu.words`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(options["seed"])
    try:
        samples = json.loads(samples_file.read_text(encoding="utf-8"))
        unknown = set(keep) - set(samples)
        if unknown:
            raise click.BadParameter(f"{samples_file} has no source {min(unknown)}; it has {', '.join(samples)}")
        layouts = {name: made for folder in boxes for name, made in read_boxes(folder.parent, folder.name).items()}
        pictured = [sample for source in samples.values() for sample in source if "image" in sample]
        kept = {sample["image"] for source in keep for sample in samples[source] if "image" in sample}
        description = checkpoint.read_description(init)
        model, tokenizer = build.load_model(str(init)), build.load_tokenizer(str(init))
        if pictures is not None and not (features_folder / "index.json").exists():
            names = sorted({sample["image"] for sample in pictured})
            spec = build.image_spec(description, None)
            features.build_cache(model, spec, pictures, names, features_folder, tower_blocks)
        cache = features.FeatureCache(features_folder)
        align_words(model, cache, pictured, tokenizer, layouts=layouts, keep=kept, **options)
        checkpoint.save_checkpoint(output, model, tokenizer, description)
    except LlavaEdgeError as error:
        raise click.ClickException(f"{error}\n{error.hint}" if error.hint else str(error)) from None
    log.info("wrote %s", output)


if __name__ == "__main__":
    main()
