"""The parity gate of one conversion: pictures and questions prepared once, then measured on every written file.

Every file is loaded as the runtime loads it. Only llama.cpp's reading of an mmproj is measured beside a correct one,
because it is known to be wrong for some right files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from llava_edge.convert import diagnose, parity
from llava_edge.convert.cases import QUESTIONS, TEXT_TOKENS, Case, ask, follow
from llava_edge.convert.mmproj_reader import MmprojReader
from llava_edge.convert.reference import Prompt
from llava_edge.convert.token_ids import measure_tokenizer
from llava_edge.engine import Engine
from llava_edge.errors import LlavaEdgeError
from llava_edge.images import normalize
from llava_edge.vision import anyres
from llava_edge.vision.mtmd import MtmdEncoder
from llava_edge.vision.onnx import OnnxEncoder
from llava_edge.vision.tokens import pool, pooled_grid

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

    from llava_edge.convert.checkpoint import Checkpoint
    from llava_edge.convert.reference import Reference

Tell: TypeAlias = "Callable[[int, int], None]"
"""Takes how much is done, of how much."""
Counter: TypeAlias = "Callable[[str], Tell]"

# Above this size llama.cpp's repacked copy of the weights would not fit a laptop's memory beside the reference.
_REPACK_BYTES = 2 * 1024**3


def _silent(things: str) -> Tell:
    return lambda done, total: None


class Gate:
    """Measures files and keeps the figures for the manifest."""

    def __init__(self, checkpoint: Checkpoint, reference: Reference, tokenizer: PreTrainedTokenizerBase) -> None:
        self._checkpoint = checkpoint
        self._reference = reference
        self._tokenizer = tokenizer
        self.images = parity.pictures(checkpoint.description.image.size)
        self._embeddings = [reference.encode(image) for image in self.images]
        self._shown = [self._as_read(image, rows) for image, rows in zip(self.images, self._embeddings, strict=True)]
        reference.release_tower()
        self._cases: list[Case] = []
        self._expected: list[NDArray[np.float32]] = []
        self._report: dict[str, Any] = {"reference": reference.versions}

    def report(self) -> dict[str, Any]:
        """All figures so far, for the manifest's ``parity``."""
        return self._report

    def measure_mmproj(self, path: Path, type_name: str) -> list[str]:
        """Measure an mmproj file through a correct reader; says in words what fails."""
        pixels = [normalize(image, self._checkpoint.description.image) for image in self.images]
        reader = MmprojReader(path)
        seen = parity.compare_embeddings(reader.encode(pixels), self._embeddings)
        failures = [f"{path.name}: {words}" for words in seen.failures(parity.MMPROJ_LIMITS[type_name])]
        if failures:
            failures += diagnose.tower(reader.hidden_states(pixels), self._reference, self.images)
        self._record("mmproj", type_name, parity.as_dict(seen))
        return failures

    def measure_mtmd(self, path: Path, type_name: str, engine: Engine) -> list[str]:
        """Measure what this version of llama.cpp makes of an mmproj file. A failure only where it should be right."""
        limits = parity.MMPROJ_LIMITS[type_name]
        try:
            encoder = MtmdEncoder(path, engine)
            try:
                seen = parity.compare_embeddings(encoder.encode(self.images), self._embeddings)
            finally:
                encoder.close()
            wrong, figures = seen.failures(limits), parity.as_dict(seen)
        except LlavaEdgeError as error:
            wrong, figures = [str(error)], {}
        why = misread(self._checkpoint) if wrong else None
        self._record("mtmd", type_name, {"right": not wrong, **figures, **({"why": why} if why else {})})
        return [] if why else [f"{path.name} in llama.cpp: {words}" for words in wrong]

    def measure_onnx(self, path: Path, type_name: str, engine: Engine, deepen: Callable[[], Path]) -> list[str]:
        """Measure an ONNX file; ``deepen`` writes one with all hidden states, should there be a fault to find."""
        spec = self._checkpoint.description.image
        encoder = OnnxEncoder(path, spec, engine)
        seen = parity.compare_embeddings(encoder.encode(self.images), self._embeddings)
        encoder.close()
        self._record("onnx", type_name, parity.as_dict(seen))
        failures = [f"{path.name}: {words}" for words in seen.failures(parity.ONNX_LIMITS[type_name])]
        if failures and type_name == "fp32":
            pixels = [normalize(image, spec) for image in self.images]
            failures += diagnose.tower(diagnose.onnx_states(deepen(), pixels), self._reference, self.images)
        return failures

    def open_engine(self, path: Path) -> Engine:
        """A language model as the runtime loads it, on the CPU."""
        longest = max(map(len, self._shown)) + TEXT_TOKENS
        repack = path.stat().st_size < _REPACK_BYTES
        return Engine(path, n_ctx=longest, n_gpu_layers=0, repack=repack)

    def measure_llm(self, engine: Engine, type_name: str, counter: Counter = _silent) -> list[str]:
        """Measure a language model; the first one gives the answers along which all are measured.

        ``counter`` makes what is told of the positions and layers that are done.
        """
        name = engine.path.name
        failures: list[str] = []
        if not self._cases:
            tokens = measure_tokenizer(engine, self._tokenizer, self._checkpoint, QUESTIONS)
            self._record("tokenizer", None, parity.as_dict(tokens))
            failures += [f"{name}: {words}" for words in tokens.failures()]
            self._cases = ask(engine, self._checkpoint.description.prompt, self._shown, counter("positions"))
            self._expected = self._answer_of_reference(counter("layers of the reference"))
            found = [case.logits for case in self._cases]
        else:
            found = follow(engine, self._cases, counter("answers"))
        limits = parity.LLM_LIMITS[type_name]
        said = parity.compare_logits(found, self._expected, limits.tie)
        self._record("llm", type_name, parity.as_dict(said))
        wrong = [f"{name}: {words}" for words in said.failures(limits)]
        if wrong and type_name in ("F32", "F16", "BF16"):
            case = self._cases[0]
            before, after = self._reference.embed([case.before, case.after])
            rows = np.concatenate([before, case.picture, after])
            wrong += diagnose.language_model(engine.path, rows, self._reference)
        return failures + wrong

    def _answer_of_reference(self, tell: Tell) -> list[NDArray[np.float32]]:
        """The reference's logits along the answers; cases that begin alike are read together."""
        runs = [run for case in self._cases for run in (case.before, [*case.after, *case.tokens[:-1]])]
        rows = iter(self._reference.embed(runs))
        prompts: list[Prompt] = []
        for case in self._cases:
            start, branch = np.concatenate([next(rows), case.picture]), next(rows)
            if prompts and np.array_equal(prompts[-1].start, start):
                prompts[-1].branches.append(branch)
            else:
                prompts.append(Prompt(start, [branch]))
        return self._reference.logits(prompts, [len(case.tokens) for case in self._cases], tell)

    def _as_read(self, image: Image.Image, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the language model reads of a picture: fewer tokens, or tiles of a wider picture put together."""
        tokens, spec = self._checkpoint.description.visual_tokens, self._checkpoint.description.image
        if spec.mode != "anyres":
            return pool(rows, tokens.grid, tokens.default)
        parts, layout = anyres.split(image.resize((image.width * 2, image.height)), spec)
        pooled = [pool(self._reference.encode(part), tokens.grid, tokens.default) for part in parts]
        cells = pooled_grid(tokens.grid, tokens.default)
        return anyres.assemble(pooled, cells, layout, self._reference.newline())

    def _record(self, kind: str, type_name: str | None, figures: dict[str, Any]) -> None:
        if type_name is None:
            self._report[kind] = figures
        else:
            self._report.setdefault(kind, {})[type_name] = figures


def misread(checkpoint: Checkpoint) -> str | None:
    """Why llama.cpp's libmtmd, as it is now, can't be right about this model; None if it should be."""
    if checkpoint.tower.class_token:
        return parity.CLASS_TOKEN_DEFECT
    if checkpoint.projector.depth > 2:
        return f"llama.cpp runs two layers of a projector; this one has {checkpoint.projector.depth}"
    return None
