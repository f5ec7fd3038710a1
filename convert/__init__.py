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
    verify: bool = True,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint in Hugging Face format into a bundle.

    Parameters
    ----------
    checkpoint
        A directory with ``config.json``, safetensors files, a tokenizer and ``llava_edge.json``.
    output
        The bundle's directory. It appears when everything in it is complete.
    llm_type, mmproj_type
        Precision of the two files, such as ``F16``, ``Q8_0``, ``Q4_K_M``.
    verify
        Measure every file against the checkpoint and fail below the limits. Without it the manifest's ``parity`` is
        null.
    force
        Replace ``output`` if it is a bundle; files in it that its manifest doesn't list are kept.
    progress
        Called with a line of text before each step.

    Returns
    -------
    dict
        ``output``, ``files`` (name, type, bytes, fall-backs), ``parity``, ``seconds``.

    Raises
    ------
    InputError
        The checkpoint is of a kind that this version can't convert faithfully; the message names the field.
    ParityError
        A file does not compute what the checkpoint says; ``OUTPUT.parity.json`` has the figures.
    MissingExtraError
        torch, transformers or safetensors are not installed.
    """
    from llava_edge.convert.pipeline import Conversion

    return Conversion(Path(checkpoint), Path(output), llm_type, mmproj_type, verify, force, progress).run()
