"""How long two readers of pictures take, in turn, and how far apart their embeddings are.

    python -m llava_edge.bench.towers --shape llava-1.5-7b --first mtmd:F16 --second native:Q8_0

Random weights: the tower and projector of the shape, and one layer of its language model, without which libmtmd reads
nothing. ``mtmd`` is llama.cpp's reader, ``native`` that of libllava_edge (``LLAVA_EDGE_LIBRARY`` names the file). The
readers alternate, after one picture each that is not counted. One JSON object goes to stdout: seconds, the ratio of the
second to the first of each pair, and the cosine between their embeddings, which says nothing of the readers' parity for
CLIP: libmtmd reads that wrongly. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge import native
from llava_edge.bench.speed.shapes import Shape, find_shape
from llava_edge.bench.speed.synthetic import MMPROJ_TYPES, write_synthetic
from llava_edge.bundle import open_bundle, probe_picture
from llava_edge.engine import Engine
from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.vision.mtmd import MtmdEncoder
from llava_edge.vision.native import NativeEncoder

if TYPE_CHECKING:
    from PIL import Image

Reader = MtmdEncoder | NativeEncoder
_READERS: dict[str, type[Reader]] = {"mtmd": MtmdEncoder, "native": NativeEncoder}


def compare(shape: Shape, names: tuple[str, str], *, pairs: int, threads: int, root: Path) -> dict[str, Any]:
    """Encode the probe picture with two readers, each named ``READER:TYPE``, in turn."""
    with ExitStack() as stack:
        readers: list[Reader] = []
        for number, name in enumerate(names):
            reader, _, kind = name.partition(":")
            if reader not in _READERS or kind not in MMPROJ_TYPES:
                raise InputError(f"no such reader: {name}; expected {'|'.join(_READERS)}:{'|'.join(MMPROJ_TYPES)}")
            folder = root / str(number)
            folder.mkdir()
            write_synthetic(replace(shape, layers=1), folder, "Q4_0", kind)
            bundle = open_bundle(folder)
            engine = stack.enter_context(closing(Engine(bundle.file("llm"), n_ctx=64, n_threads=threads)))
            readers.append(stack.enter_context(closing(_READERS[reader](bundle.file("mmproj"), engine))))
        picture = probe_picture(shape.tower.image_size)
        made = [reader.encode([picture])[0] for reader in readers]
        seconds = []
        for _ in range(pairs):
            seconds.append([_seconds(reader, picture) for reader in readers])
    ratios = [second / first for first, second in seconds]
    result: dict[str, Any] = {"shape": shape.name, "threads": threads}
    for number, name in enumerate(names):
        result[name] = {"seconds": median(pair[number] for pair in seconds)}
    cosines = np.sum(made[0] * made[1], axis=1) / np.linalg.norm(made[0], axis=1) / np.linalg.norm(made[1], axis=1)
    ratio = {"median": median(ratios), "least": min(ratios), "most": max(ratios)}
    return {**result, "ratio": ratio, "cosine": {"mean": float(cosines.mean()), "least": float(cosines.min())}}


def _seconds(reader: Reader, picture: Image.Image) -> float:
    start = time.perf_counter()
    reader.encode([picture])
    return time.perf_counter() - start


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--shape", default="llava-1.5-7b")
    parser.add_argument("--first", default="mtmd:F16")
    parser.add_argument("--second", default="native:Q8_0")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    options = parser.parse_args()
    names = (options.first, options.second)
    try:
        with tempfile.TemporaryDirectory(prefix="llava-edge-") as folder:
            found = compare(
                find_shape(options.shape), names, pairs=options.pairs, threads=options.threads, root=Path(folder)
            )
    except LlavaEdgeError as error:
        raise SystemExit(f"error: {error}") from None
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
