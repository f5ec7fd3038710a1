"""Tokenizers and chat templates of every supported kind, trained on a few lines in a moment."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Literal

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llava_edge.convert.tokenizer import _PATTERNS

CORPUS = (
    "What animal is in this picture? A brown dog runs in the snow, and two cats sleep on a red sofa.\n",
    "I'll say that it's 12 of 345 things; they've seen don't and can't.  Two   blanks.\n\n\tAnd a tab.",
    "Größe naïve 你好世界 日本語 русский язык 🐈 def f(x): return x**2\n",
    "USER: ASSISTANT: A chat between a curious user and an artificial intelligence assistant.",
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'][0]['text'] }} "
    "{% elif m['role'] == 'user' %}USER: {% for c in m['content'] %}"
    "{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}"
    "{% else %}ASSISTANT: {{ m['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The template of LLaVA-OneVision's checkpoints in transformers' format: pictures first, and a mark that only training
# heeds.
ONEVISION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + ' ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if m['role'] != 'assistant' %}{{ '\n' + c['text'] }}"
    "{% else %}{% generation %}{{ '\n' + c['text'] }}{% endgeneration %}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% for c in m['content'] %}"
    "{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'][0]['text'] + eos_token }}"
    "{% else %}{{ raise_exception('no system messages') }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' }}{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

Llm = Literal["vicuna", "mistral", "llama3", "qwen2", "smollm"]


def write_tokenizer(llm: Llm, directory: Path) -> int:
    """Train a tokenizer of the model's kind on a few lines; returns the size of its vocabulary.

    SentencePiece's is there as its model only, as in the original format.
    """
    if llm in ("vicuna", "mistral"):
        return _write_sentencepiece(directory, ["<image>"])
    specials = {
        "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
    }[llm]
    tokenizer = byte_level(llm, [*specials, "<image>"])
    ends = ("<|begin_of_text|>", "<|eot_id|>") if llm == "llama3" else (specials[0], "<|im_end|>")
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=ends[0], eos_token=ends[1], pad_token=ends[1]
    )
    wrapped.save_pretrained(directory)
    return len(wrapped)


def byte_level(llm: str, specials: list[str]) -> Tokenizer:
    """Byte-level BPE that splits texts as the model does."""
    plain = Tokenizer(models.BPE(ignore_merges=llm == "llama3"))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if llm in ("llama3", "qwen2"):
        wanted = "llama-bpe" if llm == "llama3" else "qwen2"
        pattern = next(pattern for pattern, name in _PATTERNS.items() if name == wanted)
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        plain.pre_tokenizer = pre_tokenizers.Sequence([split, last])
    elif llm == "smollm":
        plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), last])
    else:
        plain.pre_tokenizer = last
    if llm == "qwen2":
        plain.normalizer = normalizers.NFC()
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in specials],
        show_progress=False,
    )
    plain.train_from_iterator(CORPUS * 3, trainer)
    if llm == "llama3":
        plain.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
    return plain


def _write_sentencepiece(directory: Path, added: list[str]) -> int:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        split_digits=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    first = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    tokens = {"0": "<unk>", "1": "<s>", "2": "</s>", **{str(first + n): token for n, token in enumerate(added)}}
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "added_tokens_decoder": {number: {"content": token, "special": True} for number, token in tokens.items()},
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return int(first) + len(added)
