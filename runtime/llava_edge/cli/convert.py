"""``llava-edge convert``: a checkpoint in, a bundle out."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llava_edge.cli import debug_option, terminal
from llava_edge.errors import require_extra


@click.command(short_help="Turn a checkpoint into a bundle that chat can run.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The new bundle.")
@click.option("--llm-type", metavar="TYPE", default="Q4_K_M", show_default=True, help="Precision of the LLM.")
@click.option("--mmproj-type", metavar="TYPE", default="Q8_0", show_default=True, help="Precision of the tower.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare the files with the checkpoint.")
@click.option("--force", is_flag=True, help="Replace the output if it is a bundle already.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as one JSON object.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@debug_option
def convert(
    checkpoint: Path,
    output: Path,
    llm_type: str,
    mmproj_type: str,
    verify: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert CHECKPOINT, a LLaVA in Hugging Face format, into a bundle of GGUF files with a manifest.

    Needs the extra 'convert' (PyTorch and transformers).

    \b
    llava-edge convert my-llava -o my-bundle
    llava-edge chat --model my-bundle
    """
    require_extra("convert", "torch", "transformers", "safetensors")
    from llava_edge.convert import convert_checkpoint

    report = convert_checkpoint(
        checkpoint,
        output,
        llm_type=llm_type,
        mmproj_type=mmproj_type,
        verify=verify,
        force=force,
        progress=None if quiet else terminal.note,
    )
    terminal.data((json.dumps(report, ensure_ascii=False) if as_json else str(output)) + "\n")
