"""``llava-edge convert``: a checkpoint in, a bundle out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from llava_edge.cli import debug_option, terminal
from llava_edge.cli.quantize import llm_options
from llava_edge.errors import require_extra

PROMPTS = "vicuna_v1, llava_v1, mistral_instruct, chatml, chatml_direct, llama-3, plain."


@click.command(short_help="Turn a checkpoint into a bundle that chat can run.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The new bundle.")
@click.option("--llm-type", metavar="TYPE", default="Q4_K_M", show_default=True, help="Precision of the LLM.")
@click.option("--mmproj-type", metavar="TYPE", default="Q8_0", show_default=True, help="Precision of the tower.")
@click.option(
    "--vision",
    metavar="TYPE",
    default="auto",
    show_default=True,
    help="The ONNX vision model: fp32, int8, none; auto is int8 where llama.cpp can't run the tower rightly.",
)
@llm_options
@click.option(
    "--norms",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="A checkpoint with norms that were tuned for the LLM as it is rounded here, by a recipe of stage norms.",
)
@click.option("--prompt", metavar="NAME", help="The conversation format, if the checkpoint doesn't tell: " + PROMPTS)
@click.option(
    "--vision-tower",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The vision tower that a checkpoint of the original format refers to.",
)
@click.option("--base", metavar="DIR", type=click.Path(path_type=Path), help="The model that a LoRA was trained on.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare the files with the checkpoint.")
@click.option("--force", is_flag=True, help="Replace the output if it is a bundle already.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as one JSON object.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@debug_option
def convert(checkpoint: Path, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Convert CHECKPOINT into a bundle of GGUF and ONNX files with a manifest.

    CHECKPOINT is a LLaVA in the format of transformers (llava, llava_next, llava_onevision) or of the original code,
    or a LoRA adapter of one. Every file is compared with it, and the figures go into the manifest. Needs the extra
    'convert'.

    \b
    llava-edge convert my-llava -o my-bundle
    llava-edge chat --model my-bundle
    """
    require_extra("convert", "torch", "transformers", "safetensors", "onnx")
    from llava_edge.convert import convert_checkpoint

    report = convert_checkpoint(checkpoint, output, progress=None if quiet else terminal.note, **options)
    terminal.data((json.dumps(report, ensure_ascii=False) if as_json else str(output)) + "\n")
