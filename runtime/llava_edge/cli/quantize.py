"""``llava-edge quantize``: a bundle with fewer bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from llava_edge.cli import debug_option, terminal
from llava_edge.errors import require_extra
from llava_edge.quant_types import LLM_TYPES, MMPROJ_TYPES, VISION_TYPES


def types_help() -> str:
    """The types of the language model as lines of help that are not wrapped."""
    lines = [f"{name:<7} {words}" for name, words in LLM_TYPES.items()]
    return "\n".join(["\b", "Types of the language model:", *lines])


def _pairs(_: click.Context, parameter: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    """``NAME=TYPE``, several times."""
    pairs = {}
    for text in given:
        name, _equals, kind = text.rpartition("=")
        if not name or not kind:
            raise click.BadParameter(f"{text!r}; expected NAME=TYPE, such as ffn_down=Q6_K", param=parameter)
        pairs[name] = kind
    return pairs


def llm_options(command: Any) -> Any:
    """Add what is said of the language model's quantisation besides its type."""
    tensor_type = click.option(
        "--tensor-type",
        "tensor_types",
        metavar="NAME=TYPE",
        multiple=True,
        callback=_pairs,
        help="Another type for the LLM's tensors whose name has NAME in it, a regular expression: ffn_down=Q6_K. "
        "May be given several times; the first that fits counts.",
    )
    imatrix = click.option(
        "--imatrix",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="An importance matrix for the LLM, made by `llava-edge imatrix`.",
    )
    return imatrix(tensor_type(command))


@click.command(short_help="Make a bundle smaller.", epilog=types_help())
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("llm_type", metavar="TYPE")
@click.option("-o", "--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The new bundle.")
@click.option("--mmproj-type", metavar="TYPE", help=f"For the mmproj file: {', '.join(MMPROJ_TYPES)}.")
@click.option("--vision", metavar="TYPE", help=f"For the ONNX file: {', '.join(VISION_TYPES)}.")
@llm_options
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare the new files with the old ones.")
@click.option("--force", is_flag=True, help="Replace the output if it is a bundle already.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as one JSON object.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@debug_option
def quantize(bundle: Path, output: Path, llm_type: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Quantise the language model of BUNDLE, whose files are floats, to TYPE; other files stay unless asked.

    \b
    llava-edge convert my-llava -o exact --llm-type F16 --mmproj-type F16
    llava-edge quantize exact Q4_K_M -o small --mmproj-type Q8_0
    """
    if (options["vision"] or "").lower() == "int8":
        require_extra("convert", "onnx")
    from llava_edge.convert import quantize_bundle

    report = quantize_bundle(bundle, output, llm_type, progress=None if quiet else terminal.note, **options)
    if not quiet:
        for file in report["files"]:
            terminal.note(_line(file))
    terminal.data((json.dumps(report, ensure_ascii=False) if as_json else str(output)) + "\n")


def _line(file: dict[str, Any]) -> str:
    before, after = file["bytes_before"], file["bytes"]
    if before == after:
        return f"{file['path']}: {after / 1e6:.1f} MB, as it was"
    total = sum(file["tensors"].values())
    fallbacks = f"; {file['fallbacks']} of {total} tensors fell back to other types" if file["fallbacks"] else ""
    line = f"{file['path']}: {before / 1e6:.1f} MB to {after / 1e6:.1f} MB{fallbacks}"
    if file["output_error"]:
        nearest, chosen = file["output_error"]
        line += f"; rounding changes the matrices' outputs by {chosen:.2%} ({nearest:.2%} with the nearest levels)"
    return line
