"""``llava-edge train``: run one stage of a recipe."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from llava_edge.cli import debug_option, terminal
from llava_edge.errors import require_extra


@click.command(short_help="Run one stage of training from a recipe.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value, e.g. optim.steps=200.")
@click.option("--resume", is_flag=True, help="Go on from the state that a stopped run saved.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@debug_option
def train(recipe: Path, overrides: tuple[str, ...], resume: bool, quiet: bool) -> None:
    """Train as RECIPE, a TOML file, says, and print the directory of the finished checkpoint.

    Needs the extra 'train' (PyTorch, transformers, peft). Paths in the recipe are relative to where this runs.

    \b
    llava-edge train nano-align.toml
    llava-edge train nano-finetune.toml --set optim.max_minutes=30
    """
    require_extra("train", "torch", "transformers", "peft")
    from llava_edge.train_gpu.config import load_recipe
    from llava_edge.train_gpu.loop import train as run

    if not quiet:
        logging.getLogger("llava_edge.train_gpu").setLevel(logging.INFO)
    terminal.data(f"{run(load_recipe(recipe, overrides), resume=resume)}\n")
