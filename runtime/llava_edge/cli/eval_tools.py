"""``llava-edge eval compare`` and ``merge``: what is done with runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from llava_edge.cli import debug_option, terminal
from llava_edge.cli.eval_options import PATH, number, table

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@json_option
@debug_option
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Is the run SECOND better than FIRST? Paired bootstrap over pictures, and McNemar's test for right and wrong."""
    from llava_edge.bench.tasks.compare import compare as paired
    from llava_edge.bench.tasks.run import open_run

    result = paired(open_run(first), open_run(second))
    if as_json:
        terminal.data(json.dumps(result, ensure_ascii=False) + "\n")
        return
    terminal.data(_comparison(result, first, second))


def _comparison(result: dict[str, Any], first: Path, second: Path) -> str:
    difference = result["difference"]
    lines = [
        f"{result['task']} · {result['samples']} samples, {result['left_out']} left out",
        f"  {first}  {number(result['mean_first'])}",
        f"  {second}  {number(result['mean_second'])}",
        f"  difference  {difference['value']:+.4f}   {difference['low']:+.4f} to {difference['high']:+.4f}",
        f"  same answer  {result['same_answer']}",
    ]
    if result["mcnemar"] is not None:
        test = result["mcnemar"]
        lines.append(
            f"  only the first right {test['only_first']}, only the second {test['only_second']}, "
            f"p = {test['p_value']:.3g} (McNemar)"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("parts", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", metavar="DIR", type=PATH, required=True, help="The folder of the joined run.")
@json_option
@debug_option
def merge(parts: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Join the PARTS of a run that was split with --shard. The summary is that of a run in one piece."""
    from llava_edge.bench.tasks.run import merge as join

    summary = join(parts, output)
    terminal.data(json.dumps(summary, ensure_ascii=False) + "\n" if as_json else table(summary))
