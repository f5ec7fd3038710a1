"""Put a quantised language model back into its checkpoint: ``python -m llava_edge.train_gpu.quantized_llm --help``.

A projector that was trained with the LLM in full precision speaks to weights that nobody runs. After conversion, the
values of the quantised GGUF are written into the checkpoint, and a short stage ``align`` from there teaches the
projector to speak to them. Quantising the result again gives the same file, but for rounding.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import click
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from llava_edge.train_gpu import checkpoint, parts

log = logging.getLogger(__name__)


@torch.no_grad()
def put_back(model: LlavaForConditionalGeneration, gguf: Path) -> float:
    """Overwrite the language model of ``model`` with the dequantised tensors of ``gguf``.

    Returns the root mean square of the change over that of the weights: what quantisation did to them.
    """
    llm, _ = parts.llm_from_gguf(gguf)
    old, new = model.model.language_model.state_dict(), llm.model.state_dict()
    change = sum(float((old[name].float() - tensor).square().sum()) for name, tensor in new.items())
    size = sum(float(tensor.square().sum()) for tensor in new.values())
    model.model.language_model.load_state_dict(new)
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    return math.sqrt(change / size)


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="CHECKPOINT")
@click.argument("gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="LLM.gguf")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The new checkpoint.")
def main(directory: Path, gguf: Path, output: Path) -> None:
    """Write CHECKPOINT again with the values that LLM.gguf, made from it, holds after quantisation."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    log.info("quantisation moved the weights by %.2f %% of their size", 100 * put_back(model, gguf))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    checkpoint.save_checkpoint(output, model, tokenizer, checkpoint.read_description(directory))


if __name__ == "__main__":
    main()
