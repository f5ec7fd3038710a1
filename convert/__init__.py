"""A checkpoint in, a bundle out: GGUF files, a manifest, and the proof that they compute what the checkpoint says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["convert_checkpoint", "make_imatrix", "quantize_bundle"]


def convert_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    llm_type: str = "Q4_K_M",
    mmproj_type: str = "Q8_0",
    vision: str = "auto",
    imatrix: Path | None = None,
    tensor_types: Mapping[str, str] | None = None,
    norms: Path | None = None,
    verify: bool = True,
    force: bool = False,
    prompt: str | None = None,
    vision_tower: Path | None = None,
    base: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint into a bundle.

    Parameters
    ----------
    checkpoint
        A directory in the format of transformers (``llava``, ``llava_next``, ``llava_onevision``) or of the original
        LLaVA, or a LoRA adapter of one.
    output
        The bundle's directory. It appears when everything in it is complete.
    llm_type, mmproj_type
        Precision of the two GGUF files, such as ``F16``, ``Q8_0``, ``Q4_K_M``.
    vision
        The ONNX vision model: ``fp32``, ``int8``, ``none``, or ``auto`` for ``int8`` where llama.cpp can't run the
        tower and ``none`` elsewhere.
    imatrix
        An importance matrix for the language model, as ``llava-edge imatrix`` writes it. With correlations in it,
        weights are rounded to make up for each other.
    tensor_types
        Other types for single tensors of the language model: a regular expression that is looked for in their names,
        and a type such as ``Q8_0``. The first that is found counts.
    norms
        A checkpoint whose norms were tuned for the language model as it is rounded here, and which take the place of
        this one's: what a recipe of stage ``norms`` writes.
    verify
        Measure every file against the checkpoint and fail below the limits. Without it the manifest's ``parity`` is
        null.
    force
        Replace ``output`` if it is a bundle; files in it that its manifest doesn't list are kept.
    prompt
        The name of a conversation format, for a checkpoint that doesn't tell its own.
    vision_tower
        The directory of the vision tower, for a checkpoint in the original format that only refers to it.
    base
        The model that a LoRA adapter was trained on.
    progress
        Called with a line of text before each step.

    Returns
    -------
    dict
        ``output``, ``files`` (name, type, bytes, fall-backs), ``backends``, ``notes``, ``parity``, ``seconds``.

    Raises
    ------
    InputError
        The checkpoint is of a kind that this version can't convert faithfully; the message names the field.
    ParityError
        A file does not compute what the checkpoint says; ``OUTPUT.parity.json`` has the figures.
    MissingExtraError
        torch, transformers or safetensors are not installed.
    """
    from llava_edge.convert.checkpoint import Options
    from llava_edge.convert.pipeline import Conversion, Plan

    options = Options(prompt, vision_tower, base)
    where, own = (Path(checkpoint), Path(output)), tensor_types or {}
    plan = Plan(*where, llm_type, mmproj_type, vision, imatrix, own, norms, verify, force, options)
    return Conversion(plan, progress).run()


def quantize_bundle(
    bundle: Path,
    output: Path,
    llm_type: str,
    *,
    mmproj_type: str | None = None,
    vision: str | None = None,
    imatrix: Path | None = None,
    tensor_types: Mapping[str, str] | None = None,
    verify: bool = True,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Make a bundle smaller.

    Parameters
    ----------
    bundle
        A bundle whose language model is F16, BF16 or F32.
    output
        The new bundle's directory.
    llm_type, mmproj_type, vision
        Types of the new files; None leaves one as it is, and ``none`` for ``vision`` leaves it out.
    imatrix
        An importance matrix for the language model.
    tensor_types
        Other types for single tensors of the language model, as in :func:`convert_checkpoint`.
    verify
        Compare the new files with the old ones, and fail where they are too far apart.
    force
        Replace ``output`` if it is a bundle.
    progress
        Called with a line of text before each step.

    Returns
    -------
    dict
        ``output``, ``files`` (name, type, bytes before and after, fall-backs), ``bytes_before``, ``bytes``,
        ``measured``, ``warnings``, ``seconds``.

    Raises
    ------
    InputError
        A type that can't be made of what is there.
    ParityError
        The new files are too far from the old ones.
    """
    from llava_edge.convert.shrink import Quantization, QuantizePlan

    where, own = (Path(bundle), Path(output)), tensor_types or {}
    plan = QuantizePlan(*where, llm_type, mmproj_type, vision, imatrix, own, verify, force)
    return Quantization(plan, progress).run()


def make_imatrix(
    bundle: Path,
    data: Path,
    images: Path | None,
    output: Path,
    *,
    text_weight: float = 1.0,
    image_weight: float = 1.0,
    answer_weight: float = 1.0,
    limit: int | None = None,
    n_ctx: int | None = None,
    correlations: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write an importance matrix that has seen pictures.

    Parameters
    ----------
    bundle
        A bundle, best one whose language model is F16.
    data, images
        Instruction data in LLaVA's JSON and the folder of its pictures; None leaves the pictures out.
    output
        The new file, in llama.cpp's GGUF format of importance matrices.
    text_weight, image_weight, answer_weight
        What a token counts, by its kind.
    limit, n_ctx
        Only the first so many samples, and the longest that is not skipped.
    correlations
        Keep how a matrix's inputs go together as well.
    progress
        Called with a line of text now and then.

    Returns
    -------
    dict
        ``output``, ``samples``, ``skipped``, ``tokens`` by kind, ``matrices``, ``seconds``.
    """
    from llava_edge.convert import imatrix

    weights = imatrix.Weights(text_weight, image_weight, answer_weight)
    return imatrix.make_imatrix(
        Path(bundle), Path(data), images, Path(output), weights=weights, limit=limit, n_ctx=n_ctx,
        correlations=correlations, progress=progress,
    )  # fmt: skip
