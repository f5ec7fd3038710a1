"""The self-check: does a vision backend give, on this machine, the embeddings that the conversion expects?"""

from __future__ import annotations

import hashlib
import logging
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava_edge import native
from llava_edge.bundle import probe_picture
from llava_edge.errors import ModelError
from llava_edge.paths import cache_dir, exists
from llava_edge.vision import native as native_library

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.bundle import Bundle, Probe, Role
    from llava_edge.vision import VisionEncoder

log = logging.getLogger(__name__)

MIN_COSINE = 0.99
_LIBRARY = {"mtmd": "llama-cpp-python", "onnx": "onnxruntime", "coreml": "onnxruntime", "native": "libllava_edge"}


def check(encoder: VisionEncoder, bundle: Bundle, role: Role, backend: str) -> float | None:
    """Encode the probe picture once a machine, file and library; ModelError if the result is not what it should be.

    Returns the mean cosine, or None if there was nothing to do: no probe, or passed before.
    """
    probe = bundle.manifest.probe
    if probe is None:
        return None
    mark = cache_dir() / "checks" / f"{_fingerprint(bundle, role, backend)}.passed"
    if exists(mark):
        return None
    (embeddings,) = encoder.encode([probe_picture(bundle.manifest.image.size)])
    cosine = mean_cosine(embeddings, probe)
    if not cosine >= MIN_COSINE:
        raise ModelError(
            f"the vision backend {backend} is wrong on this machine: its embeddings of the probe picture have a cosine "
            f"of {cosine:.3f} to the expected ones, at least {MIN_COSINE} is needed",
            hint=f"Check the files with `Bundle.verify`, and try another version of {_LIBRARY[backend]}.",
        )
    log.info("self-check of %s passed, cosine %.5f", backend, cosine)
    _remember(mark, cosine)
    return cosine


def mean_cosine(embeddings: NDArray[np.float32], probe: Probe) -> float:
    """Mean over the probe's rows of the cosine between embeddings ``[T, D]`` and the expected rows."""
    expected = probe.array.astype(np.float64)
    if max(probe.token_rows) >= len(embeddings) or embeddings.shape[1] != expected.shape[1]:
        return 0.0
    rows = embeddings[list(probe.token_rows)].astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.nan_to_num((rows * expected).sum(axis=1) / lengths).mean())


def _fingerprint(bundle: Bundle, role: Role, backend: str) -> str:
    """Everything on which the outcome depends: the file, the expectation, the library and the machine."""
    path = bundle.file(role)
    status = path.stat()
    listed = next(file.sha256 for file in bundle.manifest.files if file.role == role)
    machine = (platform.machine(), platform.system(), native.llama().llama_print_system_info())
    version = native_library.version() if backend == "native" else metadata.version(_LIBRARY[backend])
    facts = (listed, status.st_size, status.st_mtime_ns, bundle.manifest.probe, backend, version, machine)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _remember(mark: Path, cosine: float) -> None:
    """Losing the mark costs one more check, so a cache that can't be written is not an error."""
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(f"{cosine:.6f}\n")
    except OSError as error:
        log.debug("can't write %s: %s", mark, error)
