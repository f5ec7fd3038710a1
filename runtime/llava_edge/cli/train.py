"""``llava-edge train``: run one stage of a recipe."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import click

from llava_edge.cli import debug_option, terminal
from llava_edge.errors import require_extra


@click.command(short_help="Run one stage of training from a recipe.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value, e.g. optim.steps=200.")
@click.option("--cache-features", type=click.Path(path_type=Path), metavar="DIR",
              help="Keep the frozen tower's features in DIR: each picture is encoded once.")  # fmt: skip
@click.option("--skip-bad", is_flag=True, help="Count samples that can't be read instead of stopping.")
@click.option("--resume", is_flag=True, help="Go on from the state that a stopped run saved.")
@click.option("--json", "as_json", is_flag=True, help="Print the checkpoint's directory and the last record as JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@debug_option
def train(
    recipe: Path,
    overrides: tuple[str, ...],
    cache_features: Path | None,
    skip_bad: bool,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train as RECIPE, a TOML file or the name of a built-in recipe, says, and print where the finished checkpoint is.

    Needs the extra 'train' (PyTorch, transformers, Accelerate, peft). Paths in the recipe are relative to where this
    runs. SIGTERM and Ctrl-C save the state before the run ends. torchrun starts it on several GPUs or machines.

    \b
    llava-edge train nano-align
    llava-edge train nano-finetune.toml --set optim.max_minutes=30
    torchrun --nproc-per-node 8 -m llava_edge train v1.5-finetune --set scale.sharding=fsdp2
    """
    require_extra("train", "torch", "transformers", "accelerate", "peft")
    from llava_edge.bench.tasks.cider import CiderD
    from llava_edge.train_gpu.loop import Stopped
    from llava_edge.train_gpu.loop import train as run
    from llava_edge.train_gpu.recipe_file import load_recipe

    first = os.environ.get("RANK", "0") == "0"
    if not quiet and first:
        logging.getLogger("llava_edge.train_gpu").setLevel(logging.INFO)
    try:
        changed = load_recipe(recipe, _changes(overrides, cache_features, skip_bad))
        output = run(changed, resume=resume, make_score=lambda said: CiderD(said, count_end=True).score)
    except Stopped as stopped:
        if first:
            terminal.error(str(stopped), stopped.hint)
        sys.exit(stopped.exit_code)
    if first:
        terminal.data(f"{_as_json(output) if as_json else output}\n")


def _as_json(output: Path) -> str:
    log = output.with_name(output.name + ".run") / "log.jsonl"
    return json.dumps({"output": str(output), **json.loads(log.read_text().splitlines()[-1])})


def _changes(overrides: tuple[str, ...], cache_features: Path | None, skip_bad: bool) -> tuple[str, ...]:
    """The options that are changes of the recipe, as such."""
    changes = [f"data.cache_features={json.dumps(str(cache_features))}"] if cache_features else []
    return (*overrides, *changes, *(["data.skip_bad=true"] if skip_bad else []))
