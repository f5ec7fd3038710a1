"""The parity gate of one conversion: prompts and pictures prepared once, then measured on every pair of files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.convert import parity
from llava_edge.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava_edge.convert.checkpoint import Description
    from llava_edge.convert.reference import Reference

_N_CTX = 1024


class Gate:
    """Measures files and keeps the figures for the manifest."""

    def __init__(self, reference: Reference, tokenizer: PreTrainedTokenizerBase, description: Description) -> None:
        self._tokenizer = tokenizer
        self._prompt = description.prompt
        self._images = parity.pictures(description.image.size)
        self._embeddings = [reference.encode(image) for image in self._images]
        self._cases = parity.make_cases(reference, tokenizer, description, self._embeddings)
        self._report: dict[str, Any] = {"reference": reference.versions, "mmproj": {}, "llm": {}}

    def measure(self, llm: Path, llm_type: str, mmproj: Path, mmproj_type: str) -> list[str]:
        """Measure a pair of files, those that were not measured yet; says in words what fails."""
        failures: list[str] = []
        longest = max(len(c.before) + len(c.picture) + len(c.after) + len(c.tokens) for c in self._cases)
        engine = Engine(llm, n_ctx=max(_N_CTX, longest), n_gpu_layers=0)
        try:
            if "tokenizer" not in self._report:
                tokens = parity.measure_tokenizer(engine, self._tokenizer, self._scaffold())
                self._report["tokenizer"] = parity.as_dict(tokens)
                failures += [f"{llm.name}: {words}" for words in tokens.failures()]
            if mmproj_type not in self._report["mmproj"]:
                seen = parity.measure_mmproj(mmproj, engine, self._images, self._embeddings)
                self._report["mmproj"][mmproj_type] = parity.as_dict(seen)
                failures += [f"{mmproj.name}: {w}" for w in seen.failures(parity.MMPROJ_LIMITS[mmproj_type])]
            if llm_type not in self._report["llm"]:
                said = parity.measure_llm(engine, self._cases)
                self._report["llm"][llm_type] = parity.as_dict(said)
                failures += [f"{llm.name}: {w}" for w in said.failures(parity.LLM_LIMITS[llm_type])]
        finally:
            engine.close()
        return failures

    def report(self) -> dict[str, Any]:
        """All figures so far, for the manifest's ``parity``."""
        return self._report

    def _scaffold(self) -> list[str]:
        p = self._prompt
        return [
            p.bos + p.user_prefix,
            p.image_suffix + parity.QUESTIONS[0] + p.user_suffix + p.assistant_prefix,
            p.turn_end + p.user_prefix,
            p.system.replace("{system}", "Answer briefly."),
        ]
