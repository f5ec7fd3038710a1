"""A checkpoint in, a bundle out: GGUF files, a manifest, and the proof that they compute what the checkpoint says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    llm_type: str = "Q4_K_M",
    mmproj_type: str = "Q8_0",
    vision: str = "auto",
    imatrix: Path | None = None,
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
        A directory in the format of transformers (``llava``, ``llava_next``) or of the original LLaVA, or a LoRA
        adapter of one.
    output
        The bundle's directory. It appears when everything in it is complete.
    llm_type, mmproj_type
        Precision of the two GGUF files, such as ``F16``, ``Q8_0``, ``Q4_K_M``.
    vision
        The ONNX vision model: ``fp32``, ``int8``, ``none``, or ``auto`` for ``int8`` where llama.cpp can't run the
        tower and ``none`` elsewhere.
    imatrix
        An importance matrix for the language model, as ``llava-edge imatrix`` writes it.
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
    plan = Plan(Path(checkpoint), Path(output), llm_type, mmproj_type, vision, imatrix, verify, force, options)
    return Conversion(plan, progress).run()
