"""A tokenizer of transformers in GGUF's terms: byte-level BPE (GPT-2, SmolLM2, LLaMA-3, Qwen2) and SentencePiece's."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf

from llava_edge.engine import NFC_KEY, ONE_SPACE_KEY
from llava_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_SPACE = "\u2581"
# The ways of splitting a text that llama.cpp knows by these names.
_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}


@dataclass(frozen=True)
class SpaceRule:
    """How a SentencePiece vocabulary treats the blank before a word.

    ``prefix``: every text gets one in front, by llama.cpp too; ``one``: but only if it doesn't begin with one;
    ``opening``: only the very first text of a prompt does. ``adds_bos``: prompts begin with the first token.
    """

    prefix: bool
    one: bool
    opening: bool
    adds_bos: bool

    def apply(self, text: str) -> str:
        """What llama.cpp has to read to do what the reference does with a text that stands alone."""
        return f" {text}" if self.opening and text and not text.startswith((" ", _SPACE)) else text


@functools.lru_cache(maxsize=4)
def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; nothing in the checkpoint is run."""
    import transformers

    try:
        if (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file():
            return _as_sentencepiece(transformers.LlamaTokenizer.from_pretrained(directory, local_files_only=True))
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files fail in every way
        raise InputError(f"can't read the tokenizer of {directory}: {error}") from None


def _as_sentencepiece(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Put a blank in front of every text, as SentencePiece does, whether it begins with one or not.

    Where a checkpoint has no other file, that is how its model was trained; transformers 5 does it in other ways.
    """
    from tokenizers import normalizers

    steps = [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    found: PreTrainedTokenizerBase = tokenizer
    return found


def space_rule(tokenizer: PreTrainedTokenizerBase) -> SpaceRule:
    """Told by the tokenizer's structure."""
    spec = _spec(tokenizer)
    adds = _adds_bos(tokenizer)
    split = spec["pre_tokenizer"] or {}
    if split.get("type") == "Metaspace":
        scheme = split["prepend_scheme"]
        return SpaceRule(prefix=scheme == "always", one=True, opening=scheme == "first", adds_bos=adds)
    steps = (spec["normalizer"] or {}).get("normalizers", [spec["normalizer"] or {}])
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return SpaceRule(prefix=prepends, one=False, opening=False, adds_bos=adds)


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, rule: SpaceRule, vocab_size: int
) -> None:
    """Write vocabulary, merges and special tokens; InputError, by the field, for what GGUF would get wrong."""
    spec = _spec(tokenizer)
    _check_model(spec)
    if spec["model"].get("byte_fallback"):
        _add_sentencepiece(writer, spec, rule, vocab_size)
    else:
        _add_byte_level(writer, spec, vocab_size)
    writer.add_add_bos_token(rule.adds_bos)
    writer.add_add_eos_token(False)
    _add_special_ids(writer, tokenizer)


def pre_tokenizer_name(spec: Any) -> str:
    """llama.cpp's name for the way a text is split before BPE, told by structure and not by a model's name."""
    parts = spec.get("pretokenizers", [spec]) if isinstance(spec, dict) else []
    if len(parts) == 1 and _matches(parts[0], _BYTE_LEVEL):
        return "gpt-2"
    if len(parts) == 2 and _matches(parts[0], _DIGITS) and _matches(parts[1], _BYTE_LEVEL):
        return "smollm"
    if len(parts) == 2 and parts[0].get("type") == "Split" and _matches(parts[1], {**_BYTE_LEVEL, "use_regex": False}):
        isolated = parts[0].get("behavior") == "Isolated" and not parts[0].get("invert")
        name = _PATTERNS.get(parts[0]["pattern"].get("Regex", "")) if isolated else None
        if name:
            return name
    raise InputError(
        f"tokenizer.json: pre_tokenizer is {json.dumps(spec)[:200]}; expected ByteLevel, Digits and ByteLevel, "
        "or the splits of LLaMA-3 and Qwen2"
    )


def _spec(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError("tokenizer.json is missing: only tokenizers of the `tokenizers` library are converted")
    spec: dict[str, Any] = json.loads(backend.to_str())
    return spec


def _add_byte_level(writer: gguf.GGUFWriter, spec: dict[str, Any], vocab_size: int) -> None:
    tokens, types = _vocabulary(spec, vocab_size)
    name = pre_tokenizer_name(spec["pre_tokenizer"])
    # llama.cpp takes whole words from the vocabulary first for LLaMA-3 only.
    if bool(spec["model"].get("ignore_merges")) != (name == "llama-bpe"):
        raise InputError(f"tokenizer.json: model.ignore_merges is {name != 'llama-bpe'} with the splits of {name}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_add_space_prefix(False)
    if (spec["normalizer"] or {}).get("type") == "NFC":
        writer.add_bool(NFC_KEY, True)


def _add_sentencepiece(writer: gguf.GGUFWriter, spec: dict[str, Any], rule: SpaceRule, vocab_size: int) -> None:
    tokens, types = _vocabulary(spec, vocab_size)
    for number, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and types[number] == int(gguf.TokenType.NORMAL):
            types[number] = int(gguf.TokenType.BYTE)
        elif token == spec["model"].get("unk_token"):
            types[number] = int(gguf.TokenType.UNKNOWN)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(_scores(spec, tokens))
    writer.add_token_types(types)
    writer.add_add_space_prefix(rule.prefix)
    if rule.one:
        writer.add_bool(ONE_SPACE_KEY, True)


def _scores(spec: dict[str, Any], tokens: Sequence[str]) -> list[float]:
    """llama.cpp joins the pair whose piece scores highest; the order of the merges says which one that is."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(spec["model"]["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        first.setdefault(left + right, rank)
    return [-float(first.get(token, -1) + 1) for token in tokens]


def _matches(part: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(part.get(key) == value for key, value in expected.items())


def _check_model(spec: dict[str, Any]) -> None:
    model = spec["model"]
    fallback = bool(model.get("byte_fallback"))
    wanted: dict[str, tuple[object, object]] = {
        "model.type": (model.get("type"), "BPE"),
        "model.dropout": (model.get("dropout"), None),
    }
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        wanted[f"model.{key}"] = (model.get(key) or None, None)
    normalizer = spec.get("normalizer")
    if fallback:
        wanted["normalizer"] = (_replaces_spaces(normalizer, spec.get("pre_tokenizer")), True)
    elif normalizer is not None:
        wanted["normalizer"] = (normalizer.get("type"), "NFC")
    for field, (value, expected) in wanted.items():
        if value != expected:
            raise InputError(f"tokenizer.json: {field} is {value!r}; expected {expected!r}")


def _replaces_spaces(normalizer: Any, split: Any) -> bool:
    """Whether blanks become SentencePiece's, and nothing else changes."""
    if isinstance(split, dict):
        return normalizer is None and _matches(split, {"type": "Metaspace", "replacement": _SPACE, "split": False})
    steps = (normalizer or {}).get("normalizers", [normalizer or {}])
    kinds = [step.get("type") for step in steps]
    replaces = all(
        step["pattern"] == {"String": " "} and step["content"] == _SPACE for step in steps if step["type"] == "Replace"
    )
    prepends = all(step["prepend"] == _SPACE for step in steps if step.get("type") == "Prepend")
    return replaces and prepends and kinds in (["Prepend", "Replace"], ["Replace"])


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


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts begin with the first token. InputError if other tokens are put around a text."""
    plain, added = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    if added == plain:
        return False
    if added == [tokenizer.bos_token_id, *plain]:
        return True
    raise InputError("tokenizer.json: post_processor adds tokens around a text; expected at most the first one")


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
