"""The mean of two checkpoints' weights: ``python -m llava_edge.train_gpu.average --help``.

What a further stage has learnt and what it has cost are often shared out unevenly along the way from the one to the
other: half of it may keep most of the first and little of the second (Wortsman et al., 2022, arXiv:2109.01903).
"""

from __future__ import annotations

import logging
from pathlib import Path

import click
import torch

from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.train_gpu import build, checkpoint

log = logging.getLogger(__name__)


@click.command()
@click.argument("first", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("second", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--share", default=0.5, show_default=True, type=click.FloatRange(0, 1), help="The weight of SECOND.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The checkpoint's folder.")
def main(first: Path, second: Path, share: float, output: Path) -> None:
    """Write the mean of the weights of the checkpoints FIRST and SECOND, of which one was trained from the other."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        checkpoint.spare_other(output)
        description = checkpoint.read_description(second)
        one, other = build.load_model(str(first)), build.load_model(str(second))
        mix(dict(one.named_parameters()), dict(other.named_parameters()), share)
        checkpoint.save_checkpoint(output, other, build.load_tokenizer(str(second)), description)
        build.copy_companions(str(second), output)
    except LlavaEdgeError as error:
        raise click.ClickException(f"{error}\n{error.hint}" if error.hint else str(error)) from None
    log.info("wrote %s", output)


@torch.no_grad()
def mix(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], share: float) -> None:
    """Move ``second`` in place to ``(1 - share) * first + share * second``; a tied weight may be in them once only.

    Raises
    ------
    InputError
        They are not of one shape.
    """
    if {name: value.shape for name, value in first.items()} != {name: value.shape for name, value in second.items()}:
        raise InputError("the checkpoints have other tensors, or other shapes", hint="Name two stages of one model.")
    for name, value in second.items():
        value.copy_(first[name].float().lerp(value.float(), share))


if __name__ == "__main__":
    main()
