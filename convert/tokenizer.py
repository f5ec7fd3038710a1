"""A tokenizer of transformers in GGUF's terms. So far byte-level BPE, as GPT-2 and SmolLM2 have it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf

from llava_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write vocabulary, merges and special tokens; InputError, by the field, for what GGUF would get wrong."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError("tokenizer.json is missing: only tokenizers of the `tokenizers` library are converted")
    spec = json.loads(backend.to_str())
    _check_model(spec)
    if tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids:
        raise InputError("tokenizer.json: post_processor adds tokens around a text; expected none")
    tokens, types = _vocabulary(spec, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(spec["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    _add_special_ids(writer, tokenizer)


def pre_tokenizer_name(spec: Any) -> str:
    """llama.cpp's name for the way a text is split before BPE, told by structure and not by a model's name."""
    parts = spec.get("pretokenizers", [spec]) if isinstance(spec, dict) else []
    if len(parts) == 1 and _matches(parts[0], _BYTE_LEVEL):
        return "gpt-2"
    if len(parts) == 2 and _matches(parts[0], _DIGITS) and _matches(parts[1], _BYTE_LEVEL):
        return "smollm"
    raise InputError(
        f"tokenizer.json: pre_tokenizer is {json.dumps(spec)[:200]}; expected ByteLevel, or Digits and ByteLevel"
    )


def _matches(part: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(part.get(key) == value for key, value in expected.items())


def _check_model(spec: dict[str, Any]) -> None:
    model = spec["model"]
    wanted: dict[str, tuple[object, object]] = {
        "model.type": (model.get("type"), "BPE"),
        "normalizer": (spec.get("normalizer"), None),
    }
    wanted["model.byte_fallback"] = (bool(model.get("byte_fallback")), False)
    wanted["model.ignore_merges"] = (bool(model.get("ignore_merges")), False)
    wanted["model.dropout"] = (model.get("dropout"), None)
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        wanted[f"model.{key}"] = (model.get(key) or None, None)
    for field, (value, expected) in wanted.items():
        if value != expected:
            raise InputError(f"tokenizer.json: {field} is {value!r}; expected {expected!r}")


def _vocabulary(spec: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    ids = dict(spec["model"]["vocab"])
    added = {token["content"]: token for token in spec["added_tokens"]}
    ids.update({content: token["id"] for content, token in added.items()})
    largest = max(ids.values())
    if largest >= vocab_size:
        raise InputError(f"tokenizer.json has the id {largest}; text_config.vocab_size is only {vocab_size}")
    for content, number in ids.items():
        tokens[number] = content
        types[number] = int(gguf.TokenType.NORMAL)
        if content in added:
            special = added[content]["special"]
            types[number] = int(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
    return tokens, types


def _add_special_ids(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError("tokenizer_config.json: eos_token is missing")
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
