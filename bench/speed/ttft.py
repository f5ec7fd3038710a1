"""Time to the first token against llama.cpp's own program: runs that alternate on the same machine, same files."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from llava_edge.bench import environment, statistics
from llava_edge.bench.environment import BUSY, Watch
from llava_edge.bench.models import Subject
from llava_edge.bench.record import Metric, Result, read_result, with_metrics, write_result
from llava_edge.bench.speed import first_token, peer
from llava_edge.bundle import sha256_file
from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.vision.tokens import pooled_counts

N_CTX = 2048


@dataclass(frozen=True)
class TtftSettings:
    """What to compare. ``questions`` are a first and a second one; ``counts`` begin with the peer's own number.

    ``processes`` adds whole processes of both that write ``answer_tokens``.
    """

    picture: Path
    pairs: int
    threads: int
    counts: tuple[int, ...]
    questions: tuple[str, str]
    answer_tokens: int = 32
    processes: bool = False

    def __post_init__(self) -> None:
        if not self.picture.is_file():
            raise InputError(f"no such picture: {self.picture}")
        if self.pairs < 1:
            raise InputError(f"pairs is {self.pairs}; expected 1 or more")


def default_counts(subject: Subject) -> tuple[int, ...]:
    """All of the grid, and what is left of it in cells of two and of four a side."""
    grid = subject.bundle.manifest.visual_tokens.grid
    possible = pooled_counts(grid)
    return tuple(count for count in (grid[0] * grid[1] // cell for cell in (1, 4, 16)) if count in possible)


def bench_ttft(
    subject: Subject,
    program: Path,
    bench: Path | None,
    settings: TtftSettings,
    say: Callable[[str], None],
    output: Path | None = None,
) -> Result:
    """Measure pair by pair; every ratio is made within its pair.

    After each pair the record is written to ``output``. A record of the same model and settings that is there already
    is gone on with, so that a long measurement can be done in portions.
    """
    run = _Pairs(subject, program, bench, settings)
    if output is not None and output.is_file():
        run.go_on_with(read_result(output))
    watch = Watch()
    with _home():
        if subject.bundle.manifest.probe is not None:
            say("first start, which checks the vision tower")
            run.ours("again")
        while run.done < settings.pairs:
            say(f"pair {run.done + 1} of {settings.pairs}")
            run.pair()
            if output is not None:
                write_result(output, run.result())
    others = watch.others()
    if others is not None and others > BUSY:
        run.note(f"other programs used {others:.0%} of the processor: repeat it on an idle machine")
    return run.result()


class _Pairs:
    def __init__(self, subject: Subject, program: Path, bench: Path | None, settings: TtftSettings) -> None:
        self.notes: list[str] = []
        self._subject, self._settings = subject, settings
        self._program = peer.check_program(program)
        self._bench = bench
        self._samples: defaultdict[str, list[float]] = defaultdict(list)
        self._row = subject.row()
        described = {
            **asdict(settings),
            "picture": settings.picture.name,
            "picture_sha256": sha256_file(settings.picture),
            "peer_sha256": sha256_file(self._program),
            "n_ctx": N_CTX,
            "pairs": None,
        }
        self._described = json.loads(json.dumps(described))

    @property
    def done(self) -> int:
        """Pairs so far."""
        return len(self._samples["load"])

    def go_on_with(self, before: Result) -> None:
        """Take over the samples of an earlier run; InputError if it was of something else."""
        if before.kind != "ttft" or before.settings != self._described or before.rows[0].files != self._row.files:
            raise InputError("the record in --output is of another model or other settings", hint="Name another file.")
        now = environment.result("ttft", (self._row,), self._described)
        for name in ("version", "llama_cpp_commit", "machine"):
            if getattr(before, name) != getattr(now, name):
                raise InputError(f"the record in --output is of another {name}", hint="Name another file.")
        for name, metric in before.rows[0].metrics.items():
            self._samples[name].extend(metric.samples)
        self.notes += before.warnings

    def result(self) -> Result:
        """The record of all pairs so far."""
        row = with_metrics(self._row, self.metrics(), tuple(self.notes))
        return environment.result("ttft", (row,), self._described, warnings=tuple(self.notes))

    def ours(self, step: str) -> dict[str, float]:
        """One of our processes."""
        settings = self._settings
        return first_token.run(
            step,
            bundle=str(self._subject.bundle.directory),
            picture=str(settings.picture),
            questions=settings.questions,
            counts=settings.counts,
            answer_tokens=settings.answer_tokens,
            settings={"n_threads": settings.threads, "n_ctx": N_CTX, "n_gpu_layers": 0},  # as the peer
        )

    def pair(self) -> None:
        """Ours, then theirs."""
        cold, again = self.ours("cold"), self.ours("again")
        if not again["cached_tokens"]:
            raise LlavaEdgeError("a new process found nothing in the cache on disk")
        for name, value in {**cold, "load_again": again["load"], "new_process": again["new_process"]}.items():
            self._samples[name].append(value)
        self._theirs(cold)
        if self._settings.processes:
            self._whole_processes()

    def _theirs(self, cold: dict[str, float]) -> None:
        settings = self._settings
        found = self._ask_peer(3)
        full = f"ttft_{settings.counts[0]}"
        text = found.read_tokens - settings.counts[0]
        if text != cold["text_tokens"]:
            self.note(f"the peer reads {text} tokens of text, we {cold['text_tokens']:.0f}: its format is another")
        self._samples["peer_encode"].append(found.encode_seconds)
        self._samples["peer_ttft"].append(found.ttft_seconds)
        self._ratio("encode", cold["encode"], found.encode_seconds)
        for count in settings.counts:
            self._ratio(f"ttft_{count}", cold[f"ttft_{count}"], found.ttft_seconds)
        self._ratio("second_question", cold["second_question"], cold[full])
        self._ratio("new_process", self._samples["new_process"][-1], cold[full])
        if self._bench is not None:
            llm = self._subject.bundle.file("llm")
            rate = peer.decode_rate(self._bench, llm, threads=settings.threads, tokens=settings.answer_tokens)
            self._samples["peer_decode"].append(rate)
            self._ratio("decode", cold["decode"], rate)

    def _whole_processes(self) -> None:
        settings, bundle = self._settings, self._subject.bundle.directory
        times = {}
        for name, cache in (("process_cold", False), ("process_warm", True)):
            times[name], written = first_token.whole_process(
                bundle,
                settings.picture,
                settings.questions[0],
                threads=settings.threads,
                n_ctx=N_CTX,
                tokens=settings.answer_tokens,
                cache=cache,
            )
            self._samples[name].append(times[name])
        ours = self._subject.bundle.manifest.visual_tokens.default
        if ours != settings.counts[0]:
            self.note(f"whole processes: chat reads a picture as {ours} tokens, the peer as {settings.counts[0]}")
        if written < settings.answer_tokens:
            self.note(f"the answer ends after {written} tokens, and the peer writes as many")
        theirs = self._ask_peer(written, rambling=True).process_seconds
        self._samples["peer_process"].append(theirs)
        for name, seconds in times.items():
            self._ratio(name, seconds, theirs)

    def _ask_peer(self, tokens: int, *, rambling: bool = False) -> peer.PeerRun:
        bundle, settings = self._subject.bundle, self._settings
        return peer.ask(
            self._program,
            (bundle.file("llm"), bundle.file("mmproj")),
            settings.picture,
            settings.questions[0],
            threads=settings.threads,
            n_ctx=N_CTX,
            tokens=tokens,
            rambling=rambling,
        )

    def _ratio(self, name: str, ours: float, theirs: float) -> None:
        self._samples[f"ratio_{name}"].append(ours / theirs)

    def note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def metrics(self) -> dict[str, Metric]:
        """Medians with their intervals and samples."""

        def unit(name: str) -> str:
            if name.startswith("ratio_"):
                return "ratio"
            return "tokens/s" if name.endswith("decode") else "tokens" if name.endswith("tokens") else "s"

        return {name: statistics.of_samples(unit(name), values) for name, values in self._samples.items()}


@contextmanager
def _home() -> Iterator[None]:
    """A cache of our own, on the disk on which caches lie, that is gone afterwards."""
    from llava_edge.cache import LIMIT_VARIABLE, default_limit
    from llava_edge.paths import cache_dir

    if default_limit() == 0:
        raise InputError(f"{LIMIT_VARIABLE} is 0, and the cache is what is measured", hint="Unset it.")
    root = cache_dir()
    root.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("LLAVA_EDGE_HOME")
    with tempfile.TemporaryDirectory(prefix="ttft-", dir=root) as folder:
        os.environ["LLAVA_EDGE_HOME"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["LLAVA_EDGE_HOME"]
            else:
                os.environ["LLAVA_EDGE_HOME"] = before
