"""The language model of a checkpoint into a GGUF for llama.cpp, with its tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import gguf

from llava_edge.convert.gguf_file import FloatType, TensorWriter
from llava_edge.convert.tokenizer import add_tokenizer
from llava_edge.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from llava_edge.bundle import PromptFormat
    from llava_edge.convert.checkpoint import Checkpoint, Weights


def write_llm(
    checkpoint: Checkpoint,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    float_type: FloatType = "F16",
) -> None:
    """Write the language model. An output matrix that is tied to the word embeddings is not written twice."""
    text = checkpoint.config.text_config
    writer = TensorWriter(path, gguf.MODEL_ARCH.LLAMA, "llama", float_type)
    _add_keys(writer.gguf, checkpoint)
    add_tokenizer(writer.gguf, tokenizer, text.vocab_size)
    writer.gguf.add_chat_template(chat_template(checkpoint.description.prompt))

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, text.num_hidden_layers)
    for name in weights.names("language_model."):
        target = names.get_name(f"model.{name.removeprefix('language_model.')}", try_suffixes=(".weight",))
        if target is None:
            raise InputError(f"the tensor {name} has no place in llama.cpp's LLaMA architecture")
        writer.add(target, _for_llama(name, weights.take(name), text.num_attention_heads, text.num_key_value_heads))
    _add_output(writer, checkpoint, weights)
    writer.close()


def _add_keys(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    text = checkpoint.config.text_config
    writer.add_type("model")
    writer.add_name(checkpoint.description.name)
    writer.add_license(checkpoint.description.license)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)


def _add_output(writer: TensorWriter, checkpoint: Checkpoint, weights: Weights) -> None:
    tied = checkpoint.config.tie_word_embeddings or checkpoint.config.text_config.tie_word_embeddings
    if tied:
        weights.leave("lm_head.weight")
    else:
        writer.add("output.weight", weights.take("lm_head.weight"))


def _for_llama(name: str, weight: NDArray[np.float32], heads: int, kv_heads: int) -> NDArray[np.float32]:
    if name.endswith("q_proj.weight"):
        return interleave_rope(weight, heads)
    if name.endswith("k_proj.weight"):
        return interleave_rope(weight, kv_heads)
    return weight


def interleave_rope(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows ``[heads x head_dim, D]`` of a query or key matrix.

    transformers turns component i together with i + head_dim / 2, llama.cpp's LLaMA architecture neighbours.
    """
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def chat_template(prompt: PromptFormat) -> str:
    """The prompt format as a Jinja template, for programs that read only the GGUF."""
    before, _, after = prompt.system.partition("{system}")
    system = f"{_text(before)} + message['content'] + {_text(after)}"
    user = f"{_text(prompt.user_prefix)} + message['content'] + {_text(prompt.user_suffix)}"
    assistant = f"{_text(prompt.assistant_prefix)} + message['content'] + {_text(prompt.turn_end)}"
    start = f"{{{{ {_text(prompt.bos)} }}}}" if prompt.bos else ""
    if prompt.default_system is not None:
        default = _text(prompt.system.replace("{system}", prompt.default_system))
        start += f"{{% if messages[0]['role'] != 'system' %}}{{{{ {default} }}}}{{% endif %}}"
    return (
        f"{start}{{% for message in messages %}}"
        f"{{% if message['role'] == 'system' %}}{{{{ {system} }}}}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {user} }}}}"
        f"{{% else %}}{{{{ {assistant} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {_text(prompt.assistant_prefix)} }}}}{{% endif %}}"
    )


def _text(value: str) -> str:
    """A Jinja literal."""
    return json.dumps(value, ensure_ascii=False)
