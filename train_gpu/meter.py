"""How fast a run is and what it uses, added up between two records."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

import torch

from llava_edge.train_gpu.flops import peak_flops

if TYPE_CHECKING:
    from llava_edge.train_gpu.data import Step
    from llava_edge.train_gpu.loop import Run


class Meter:
    """Adds up between two records what a person wants to know."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.peak = peak_flops(run.engine.device, run.recipe.scale.peak_tflops)
        self.waited = 0.0
        self.score: float | None = None
        self._reset()

    def _reset(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.scores: list[float] = []
        self.totals = [0.0] * 5
        self.spent = 0.0
        self.waited = 0.0

    def counts(self, step: Step) -> list[float]:
        """Real tokens, all tokens, pictures, operations, truncated samples of this process's part."""
        batches = (*step.batches, *step.drawn)
        return [
            sum(batch.real_tokens for batch in batches),
            sum(batch.ids.numel() for batch in batches),
            sum(batch.n_pictures for batch in batches),
            sum(self.run.flops.count(batch) for batch in batches),
            step.truncated / self.run.engine.world,  # every process knows all of them
        ]

    def add(self, loss: float, norm: float, counts: list[float], spent: float) -> None:
        """Take up one step."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.scores += [] if self.score is None else [self.score]
        self.totals = [a + b for a, b in zip(self.totals, counts, strict=True)]
        self.spent += spent

    def write(self, factor: float) -> None:
        """Write the record of the steps since the last."""
        run = self.run
        real, padded, pictures, flops, truncated = self.totals
        done = run.progress()
        record = {
            "step": run.step,
            "epoch": round(run.step * run.recipe.optim.batch_size / run.mixture.n_items, 4),
            "loss": sum(self.losses) / len(self.losses),
            "lr": run.recipe.optim.lr * factor,
            "grad_norm": sum(self.norms) / len(self.norms),
            "tokens_per_second": real / self.spent,
            "pictures_per_second": pictures / self.spent,
            "packing_efficiency": real / max(padded, 1),
            "mfu": flops / self.spent / (self.peak * run.engine.world) if self.peak else None,
            "input_wait": self.waited / self.spent,
            "memory_bytes": _memory_bytes(run.engine.device),
            "truncated": round(truncated),
            "skipped": run.skipped.count,
            "step_seconds": self.spent / len(self.losses),
            "total_seconds": run.seconds,
            "progress": round(done, 4),
            "eta_seconds": run.seconds / done * (1 - done) if 0 < done < 1 else 0.0,
        }
        if self.scores:
            record["score"] = sum(self.scores) / len(self.scores)
        if run.journal is not None:
            run.journal.write(record, run.mixture.steps)
        self._reset()


def _memory_bytes(device: torch.device) -> int:
    """The most that this process has held: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
