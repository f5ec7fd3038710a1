"""A random LLaVA of a few hundred thousand parameters whose every tensor matters to the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>"]
CORPUS = [
    "What animal is in this picture? A brown dog runs in the snow, and two cats sleep on a red sofa.\n",
    "I'll say that it's 12 of 345 things; they've seen don't and can't.  Two   blanks.\n\n\tAnd a tab.",
    "Größe naïve 你好世界 日本語 русский язык 🐈 def f(x): return x**2\n",
]

MakeCheckpoint = Callable[..., Path]


def description() -> dict[str, Any]:
    return {
        "name": "tiny",
        "family": "llava",
        "license": "Apache-2.0",
        "source": "made by a test",
        "image": {"mode": "pad", "size": 56, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "pad_color": [9, 8, 7]},
        "visual_tokens": {"full": 16, "grid": [4, 4], "trained": [16, 4], "default": 4},
        "prompt": {
            "bos": "",
            "system": "<|im_start|>system\n{system}<|im_end|>\n",
            "default_system": None,
            "user_prefix": "<|im_start|>user\n",
            "user_suffix": "<|im_end|>\n",
            "assistant_prefix": "<|im_start|>assistant\n",
            "turn_end": "<|im_end|>\n",
            "stop": ["<|im_end|>"],
            "image_suffix": "\n",
        },
    }


def make_tokenizer(*, digits: bool) -> PreTrainedTokenizerFast:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]) if digits else byte_level
    )
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        show_progress=False,
    )
    plain.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def make_model(vocab_size: int, feature_layers: list[int], tied: bool) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    tower = Dinov2Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14, layer_norm_eps=1e-6,
        use_mask_token=False, initializer_range=0.15,
    )  # fmt: skip
    llm = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=tied, initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=llm, image_token_index=4, projector_hidden_act="gelu", image_seq_length=16,
        vision_feature_layer=feature_layers, vision_feature_select_strategy="default", tie_word_embeddings=tied,
        vision_class_token=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "multi_modal_projector" in name:
                parameter.normal_(0, 0.2)
            elif "embed_tokens" in name or "lm_head" in name:
                # Answers then vary, while rounding to 4 bits is not blown up by every layer.
                parameter.normal_(0, 0.3)
            elif parameter.ndim == 1 and ("norm" in name or "lambda" in name) and not name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1 or "cls_token" in name:
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    def make(*, feature_layers: tuple[int, ...] = (1, 2), tied: bool = True, digits: bool = True) -> Path:
        directory = tmp_path_factory.mktemp("checkpoint")
        tokenizer = make_tokenizer(digits=digits)
        # The embedding table is longer than the vocabulary, as in many released models.
        make_model(len(tokenizer) + 4, list(feature_layers), tied).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "llava_edge.json").write_text(json.dumps(description()))
        return directory

    return make


@pytest.fixture(scope="session")
def checkpoint_dir(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint()
