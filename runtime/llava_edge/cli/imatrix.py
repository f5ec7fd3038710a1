"""``llava-edge imatrix``: an importance matrix that has seen pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from llava_edge.cli import debug_option, terminal

WEIGHT = click.FloatRange(0)


@click.command(short_help="Learn from pictures and answers which weights matter most.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="FILE", type=click.Path(path_type=Path), help="LLaVA's JSON.")
@click.option("--images", metavar="DIR", type=click.Path(path_type=Path), help="The folder of its pictures.")
@click.option("--text-only", is_flag=True, help="Leave the pictures out.")
@click.option("-o", "--output", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The new file.")
@click.option("--image-weight", type=WEIGHT, default=1.0, show_default=True, help="What a picture's token counts.")
@click.option("--answer-weight", type=WEIGHT, default=1.0, show_default=True, help="What a token of an answer counts.")
@click.option("--text-weight", type=WEIGHT, default=1.0, show_default=True, help="What every other token counts.")
@click.option("--correlations", is_flag=True, help="Keep how inputs go together too: better rounding, a large file.")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="Only the first so many samples.")
@click.option("--n-ctx", metavar="N", type=click.IntRange(64), help="Context in tokens; longer samples are skipped.")
@click.option("--json", "as_json", is_flag=True, help="Print what was seen as one JSON object.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@debug_option
def imatrix(
    bundle: Path, data: Path, images: Path | None, output: Path, text_only: bool, as_json: bool, quiet: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Run instruction data with its pictures through the language model of BUNDLE, best one of floats, and write
    llama.cpp's GGUF file of what went into every matrix. `convert` and `quantize` take it as --imatrix. With
    --correlations, for models of up to half a billion parameters or so, they round weights to make up for each other.

    \b
    llava-edge imatrix exact --data train.json --images photos -o matrix.gguf --limit 500
    llava-edge quantize exact Q4_K_M -o small --imatrix matrix.gguf
    """
    if (images is None) != text_only:
        raise click.UsageError("name the pictures' folder with --images, or leave them out with --text-only")
    from llava_edge.convert import make_imatrix

    report = make_imatrix(bundle, data, images, output, progress=None if quiet else terminal.note, **options)
    terminal.data((json.dumps(report, ensure_ascii=False) if as_json else str(output)) + "\n")
