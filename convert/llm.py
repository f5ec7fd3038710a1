"""The language model of a checkpoint into a GGUF for llama.cpp, with its tokenizer and chat template."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from llava_edge.convert.gguf_file import FloatType, TensorWriter
from llava_edge.convert.prompts import jinja_source
from llava_edge.convert.tokenizer import add_tokenizer, space_rule
from llava_edge.convert.tower import Lazy
from llava_edge.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from llava_edge.convert.checkpoint import Checkpoint
    from llava_edge.convert.weights import Weights

# llama.cpp runs Mistral in its LLaMA architecture.
_ARCHS = {
    "llama": (gguf.MODEL_ARCH.LLAMA, "llama"),
    "mistral": (gguf.MODEL_ARCH.LLAMA, "llama"),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, "qwen2"),
}


def write_llm(
    checkpoint: Checkpoint,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    float_type: FloatType = "F16",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the language model. An output matrix that is tied to the word embeddings is not written twice."""
    text = checkpoint.text_config
    arch, name = _ARCHS[text.model_type]
    writer = TensorWriter(path, arch, name, float_type)
    _add_keys(writer.gguf, checkpoint)
    rule = space_rule(tokenizer)
    add_tokenizer(writer.gguf, tokenizer, rule, text.vocab_size)
    writer.gguf.add_chat_template(jinja_source(checkpoint.description.prompt, bos_added=rule.adds_bos))
    for target, tensor in _tensors(checkpoint, weights, arch):
        writer.add(target, tensor)
    writer.close(progress)


def head_width(text: PretrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _add_keys(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    text = checkpoint.text_config
    # llama.cpp attends to everything: a model with a window is right as far as the window reaches.
    window = getattr(text, "sliding_window", None) or text.max_position_embeddings
    writer.add_type("model")
    writer.add_name(checkpoint.description.name)
    writer.add_license(checkpoint.description.license)
    writer.add_context_length(min(text.max_position_embeddings, window))
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head_width(text))
    writer.add_value_length(head_width(text))
    writer.add_rope_dimension_count(head_width(text))
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    if text.rope_parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(text.rope_parameters["factor"])
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)


def norm_tensors(text: PretrainedConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every norm of the language model by its name in a GGUF: its name here and its shape. All are float32 there."""
    names = gguf.get_tensor_name_map(_ARCHS[text.model_type][0], text.num_hidden_layers)
    return {
        _target(names, name): (name, shape)
        for name, shape in expected_shapes(text).items()
        if name.endswith("norm.weight")
    }


def _target(names: gguf.TensorNameMap, name: str) -> str:
    target = names.get_name(f"model.{name.removeprefix('language_model.')}", try_suffixes=(".weight", ".bias"))
    assert target is not None, name
    return str(target)


def _tensors(checkpoint: Checkpoint, weights: Weights, arch: gguf.MODEL_ARCH) -> list[tuple[str, Lazy]]:
    text = checkpoint.text_config
    names = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    interleaved = arch == gguf.MODEL_ARCH.LLAMA
    found: list[tuple[str, Lazy]] = []
    for name, shape in expected_shapes(text).items():
        weights.check_shape(name, shape)
        found.append((_target(names, name), Lazy(shape, _loader(weights, name, text if interleaved else None))))
    # Older releases of transformers saved the angles of the rotary embedding.
    weights.leave(*[n for n in weights.names("language_model.") if n.endswith("rotary_emb.inv_freq")])
    if (factors := rope_factors(text)) is not None:
        found.append(("rope_freqs.weight", Lazy(factors.shape, lambda: factors)))
    if checkpoint.tied:
        _leave_tied_head(weights)
    else:
        shape = (text.vocab_size, text.hidden_size)
        weights.check_shape("lm_head.weight", shape)
        found.append(("output.weight", Lazy(shape, lambda: weights.take("lm_head.weight"))))
    return found


def _leave_tied_head(weights: Weights) -> None:
    """Some files keep a copy of the tied matrix. InputError if it is no copy: which one is meant, nothing says."""
    if "lm_head.weight" not in weights:
        return
    head, table = weights.take("lm_head.weight"), weights.take("language_model.embed_tokens.weight")
    if not np.array_equal(head, table):
        raise InputError(
            "config.json: tie_word_embeddings is True, and lm_head.weight is another matrix than embed_tokens.weight",
            hint="If the head was trained by itself, set tie_word_embeddings to false.",
        )


def expected_shapes(text: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the language model but its head, by name here, and the shape that the configuration says."""
    width, hidden, head = text.hidden_size, text.intermediate_size, head_width(text)
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (hidden, width),
        "mlp.up_proj.weight": (hidden, width),
        "mlp.down_proj.weight": (width, hidden),
    }
    if text.model_type == "qwen2":
        block |= {
            "self_attn.q_proj.bias": (queries,),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.bias": (keys,),
        }
    shapes: dict[str, tuple[int, ...]] = {"language_model.embed_tokens.weight": (text.vocab_size, width)}
    for layer in range(text.num_hidden_layers):
        shapes |= {f"language_model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return {**shapes, "language_model.norm.weight": (width,)}


def _loader(weights: Weights, name: str, interleaved: PretrainedConfig | None) -> Callable[[], NDArray[np.float32]]:
    heads = 0
    if interleaved is not None and name.endswith(("q_proj.weight", "k_proj.weight")):
        query = name.endswith("q_proj.weight")
        heads = interleaved.num_attention_heads if query else interleaved.num_key_value_heads
    return lambda: interleave_rope(weights.take(name), heads) if heads else weights.take(name)


def interleave_rope(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows ``[heads x head_dim, D]`` of a query or key matrix.

    transformers turns component i together with i + head_dim / 2, llama.cpp's LLaMA architecture neighbours.
    """
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def rope_factors(text: PretrainedConfig) -> NDArray[np.float32] | None:
    """LLaMA-3.1's divisors of the rotary frequencies ``[head_dim / 2]``; None for the other kinds of scaling.

    Long waves are stretched by ``factor``, short ones stay, and between the two is a smooth passage.
    """
    rope: dict[str, Any] = text.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    missing = [
        key
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if key not in rope
    ]
    if missing:
        raise InputError(f"config.json: rope_parameters lacks {missing[0]}, which rope_type llama3 needs")
    width = head_width(text)
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    learnt = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((learnt / waves - low) / (high - low), 0, 1)
    factors: NDArray[np.float32] = (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
    return factors
