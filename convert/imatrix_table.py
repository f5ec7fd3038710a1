"""``python -m llava_edge.convert.imatrix_table BUNDLE …``: does an importance matrix that has seen pictures help?

The language model of a bundle of floats is quantised without a matrix, with one from the texts alone and with one from
texts and pictures; each is led along held-out answers about held-out pictures, and its next-token distributions are
compared with those of the floats.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

import llava_edge
from llava_edge.convert import imatrix, make_imatrix
from llava_edge.convert.cases import Case, follow, prompt_ids
from llava_edge.convert.parity import kl_divergence
from llava_edge.convert.quantize import Quantized, check_type, quantize
from llava_edge.engine import Engine
from llava_edge.errors import InputError
from llava_edge.prompt import PromptTokenizer
from llava_edge.quant_types import LLM_TYPES

TYPES = ("Q4_K_M", "Q3_K_M", "Q2_K")
_ROOM = 512
HEADER = """Mean KL divergence (nats, from the floats) over {tokens} answer tokens of {cases} held-out pictures. The
last columns are differences of the pictures' means with their standard error; below 0 the pictures helped.

| type | tensors that fall back | none | text only | with pictures | pictures - none | pictures - text |
|---|---|---|---|---|---|---|
"""


def held_out_cases(bundle: Path, samples: Sequence[imatrix.Sample]) -> tuple[Path, list[Case]]:
    """The language model's file, and its own distributions along the answer to each sample's first question."""
    cases = []
    with llava_edge.load(bundle, n_gpu_layers=0, cache=False) as model:
        if model.bundle is None:
            raise InputError("this needs a bundle")
        tokenizer, prompt = PromptTokenizer(model.engine), model.bundle.manifest.prompt
        for sample in samples:
            if sample.image is None:
                continue
            question, answer = sample.turns[0]
            before, after = prompt_ids(model.engine, prompt, question)
            rows = model.encode(model.open_picture(sample.image)).chunks[0].embeddings
            assert rows is not None
            case = Case(before, rows, after, tokenizer.plain(answer), np.empty((0, 0), np.float32))
            (logits,) = follow(model.engine, [case])
            cases.append(Case(before, rows, after, case.tokens, logits))
        return model.engine.path, cases


def divergences(path: Path, cases: Sequence[Case]) -> list[float]:
    """Mean divergence of each case."""
    longest = max(len(case.before) + len(case.picture) + len(case.after) + len(case.tokens) for case in cases)
    engine = Engine(path, n_ctx=longest + _ROOM, n_gpu_layers=0)
    try:
        found = follow(engine, cases)
        return [float(kl_divergence(case.logits, rows).mean()) for case, rows in zip(cases, found, strict=True)]
    finally:
        engine.close()


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Samples for the matrices.")
@click.option("--images", required=True, type=click.Path(path_type=Path), help="The folder of their pictures.")
@click.option("--held-out", required=True, type=click.Path(path_type=Path), help="Samples to measure with.")
@click.option("--held-out-images", required=True, type=click.Path(path_type=Path), help="The folder of theirs.")
@click.option("--limit", default=300, show_default=True, help="Samples for the matrices.")
@click.option("--measure", default=100, show_default=True, help="Samples to measure with.")
@click.option("--types", default=",".join(TYPES), show_default=True, help="Types to make.")
def main(
    bundle: Path, data: Path, images: Path, held_out: Path, held_out_images: Path, limit: int, measure: int, types: str
) -> None:
    """Write a table in Markdown to standard output."""

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    samples = imatrix.read_samples(held_out, held_out_images)[:measure]
    with tempfile.TemporaryDirectory() as work:
        matrices: dict[str, Path | None] = {"none": None}
        for name, folder in (("text", None), ("pictures", images)):
            matrices[name] = Path(work) / f"{name}.gguf"
            report = make_imatrix(bundle, data, folder, Path(work) / f"{name}.gguf", limit=limit, progress=say)
            say(f"{name}: {report['samples']} samples, {report['tokens']}")
        source, cases = held_out_cases(bundle, samples)
        tokens = sum(len(case.tokens) for case in cases)
        sys.stdout.write(HEADER.format(tokens=tokens, cases=len(cases)))
        for type_name in types.split(","):
            found: dict[str, list[float]] = {}
            for name, matrix in matrices.items():
                target = Path(work) / "llm.gguf"
                made = quantize(source, target, check_type(type_name, LLM_TYPES), imatrix=matrix)
                found[name] = divergences(target, cases)
                say(f"{type_name}, {name}: {np.mean(found[name]):.3g}")
            sys.stdout.write(_row(type_name, made, found))
            sys.stdout.flush()


def _row(type_name: str, made: Quantized, found: dict[str, list[float]]) -> str:
    means = [f"{np.mean(found[name]):.3g}" for name in ("none", "text", "pictures")]
    differences = [_difference(found["pictures"], found[name]) for name in ("none", "text")]
    fallbacks = f"{made.fallbacks} of {sum(made.tensors.values())}"
    return f"| {' | '.join((type_name, fallbacks, *means, *differences))} |\n"


def _difference(one: Sequence[float], other: Sequence[float]) -> str:
    values = np.subtract(one, other)
    return f"{values.mean():+.2g} ± {values.std(ddof=1) / len(values) ** 0.5:.1g}"


if __name__ == "__main__":
    main()
