"""One bundle's speed, step by step."""

from __future__ import annotations

import functools
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops

import llava_edge
from llava_edge import native
from llava_edge.bench import environment, statistics
from llava_edge.bench.models import Subject
from llava_edge.bench.record import Metric, Result, Row, with_metrics, write_so_far
from llava_edge.bench.speed import ceilings, cold
from llava_edge.bench.speed.repeat import Limits, rate, repeat
from llava_edge.bundle import probe_picture
from llava_edge.errors import InputError

if TYPE_CHECKING:
    from collections import Counter

    from llava_edge.engine import Engine

log = logging.getLogger(__name__)

Say = Callable[[str], None]
PICTURE_SIZE = (640, 480)
_ROOM = 256  # tokens of the question and its scaffold, generously


@dataclass(frozen=True)
class SpeedSettings:
    """What to measure. ``prompt_tokens`` and ``depths`` are in tokens; ``cold_starts`` 0 leaves these out.

    With more than one of the ``passes`` every figure of every bundle is taken once in each, so that its interval knows
    how the machine's speed drifts; ``limits`` hold for a single pass.
    """

    threads: int = field(default_factory=native.default_threads)
    prompt_tokens: int = 512
    answer_tokens: int = 64
    depths: tuple[int, ...] = (0, 512)
    cold_starts: int = 3
    passes: int = 1
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("threads", "prompt_tokens", "answer_tokens", "passes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not self.depths or min(self.depths) < 0:
            raise InputError(f"depths are {list(self.depths)}; expected numbers of tokens from 0 on")

    @property
    def facts(self) -> dict[str, Any]:
        """The settings for a record: those that are used."""
        found = asdict(self)
        if self.passes > 1:
            del found["limits"]
        return found

    @property
    def limits_of_pass(self) -> Limits:
        """How often a figure is taken in one pass."""
        return self.limits if self.passes == 1 else replace(self.limits, min_repetitions=1, max_repetitions=1)

    def starts_in(self, number: int) -> int:
        """Cold starts in a pass, by its number from 0."""
        return len(range(number, self.cold_starts, self.passes))


def bench_speed(
    subjects: Sequence[Subject], settings: SpeedSettings, say: Say = log.info, output: Path | None = None
) -> Result:
    """Measure the machine's ceilings, then every bundle, in each pass. After each bundle the record is written to
    ``output``.
    """
    result = environment.result("speed", (), settings.facts)
    ceilings_of: list[dict[str, Metric]] = []
    measured: list[list[Row]] = [[] for _ in subjects]
    for number in range(settings.passes):
        ceilings_of.append(measure_ceilings(subjects, settings.threads, say))
        found = ceilings_of_passes(ceilings_of)
        for subject, passes in zip(subjects, measured, strict=True):
            passes.append(measure_speed(subject, settings, ceilings_of[-1], say, number))
            rows = tuple(of_passes(each, settings.passes) for each in measured if each)
            result = environment.result("speed", rows, settings.facts, ceilings=found, warnings=warnings_of(rows))
            write_so_far(output, result, say)
    return result


def of_passes(rows: Sequence[Row], wanted: int) -> Row:
    """What was measured of a bundle in ``wanted`` passes, or so far, as one row: each pass is a sample."""
    if wanted == 1:
        return rows[0]
    metrics: dict[str, Metric] = {}
    uncertain = []
    for name in dict.fromkeys(name for row in rows for name in row.metrics):
        found = [row.metrics[name] for row in rows if name in row.metrics]
        metrics[name] = statistics.of_samples(found[0].unit, [metric.value for metric in found])
        spread = statistics.half_width(metrics[name])
        if spread is not None and spread > Limits.spread:
            uncertain.append(f"{name} by {spread:.0%}")
    if "ttft_warm_p95" in metrics:
        metrics["ttft_warm_p95"] = Metric("s", statistics.percentile(metrics["ttft_warm"].samples, 0.95))
    notes = dict.fromkeys(note for row in rows for note in row.notes)
    doubt = [f"{len(rows)} of {wanted} passes"] if len(rows) < wanted else []
    doubt += [f"uncertain over {len(rows)} passes: {', '.join(uncertain)}"] if uncertain else []
    return replace(rows[0], metrics=metrics, notes=(*doubt, *notes))


def ceilings_of_passes(passes: Sequence[Mapping[str, Metric]]) -> dict[str, Metric]:
    """The machine's ceilings in several passes as one: the median, with each pass as a sample."""
    if len(passes) == 1:
        return dict(passes[0])
    return {
        name: statistics.of_samples(metric.unit, [found[name].value for found in passes if name in found])
        for name, metric in passes[0].items()
    }


def warnings_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The rows' notes, each with its row's label."""
    return tuple(f"{row.label}: {note}" for row in rows for note in row.notes)


def measure_ceilings(
    subjects: Sequence[Subject], threads: int, say: Say, known: Mapping[str, Metric] | None = None
) -> dict[str, Metric]:
    """``read_bandwidth``, and ``matrix_rate TYPE`` of every type in the bundles' files, but for what is ``known``."""
    found = dict(known or {})
    types = set().union(*(weights.matrix_types for subject in subjects for weights in subject.weights.values()))
    missing = [name for name in sorted(types) if f"matrix_rate {name}" not in found]
    if missing or not found:
        say("the machine's ceilings")
    if "read_bandwidth" not in found:
        found["read_bandwidth"] = ceilings.read_bandwidth(threads)
    for name in missing:
        found[f"matrix_rate {name}"] = ceilings.matrix_rate(name, threads)
    return found


def measure_speed(
    subject: Subject, settings: SpeedSettings, found: dict[str, Metric], say: Say, number: int = 0
) -> Row:
    """All figures of one bundle, in the pass of that ``number`` from 0.

    It is started in processes of its own first, while nothing holds its files.
    """
    run = _SpeedRun(subject, settings, found, say)
    with tempfile.TemporaryDirectory(prefix="llava-edge-bench-") as folder:
        picture = Path(folder) / "picture.png"
        make_picture(0).save(picture)
        run.cold_starts(picture, number)
    run.load()
    run.note_interference()
    return replace(with_metrics(subject.row(), run.metrics, tuple(run.notes)), vision_backend=run.vision_backend)


def make_picture(number: int) -> Image.Image:
    """A picture that differs from every other number's, so that nothing of it is in a cache."""
    return ImageChops.offset(probe_picture(max(PICTURE_SIZE)).crop((0, 0, *PICTURE_SIZE)), 5 * number, 3 * number)


def prefill_seconds(engine: Engine, tokens: Sequence[int]) -> float:
    """Time to read a prompt, into an empty context."""
    engine.truncate(0)
    started = time.perf_counter()
    engine.decode_tokens(tokens)
    return time.perf_counter() - started


def decode_seconds(engine: Engine, tokens: Sequence[int], depth: int) -> float:
    """Time to evaluate tokens one by one after the first ``depth`` of the context."""
    engine.truncate(depth)
    started = time.perf_counter()
    for token in tokens:
        engine.decode_tokens([token])
    return time.perf_counter() - started


class _SpeedRun:
    def __init__(self, subject: Subject, settings: SpeedSettings, found: dict[str, Metric], say: Say) -> None:
        self.metrics: dict[str, Metric] = {}
        self.notes: list[str] = []
        self.vision_backend = ""
        self._subject = subject
        self._settings = settings
        self._ceilings = found
        self._report = say
        self._random = np.random.default_rng(0)
        self._others: dict[str, float] = {}
        self._pictures = 0
        self._watch = environment.Watch()
        self._n_ctx, self._depths = self._fit()

    def _fit(self) -> tuple[int, list[int]]:
        """The context that the depths need, and those that the model's context holds."""
        settings, longest = self._settings, self._subject.weights["llm"].context_length
        depths = [depth for depth in settings.depths if not longest or depth + settings.answer_tokens < longest]
        for depth in sorted(set(settings.depths) - set(depths)):
            self.notes.append(f"depth {depth} is left out: the model's context has {longest} tokens")
        needed = [d + settings.answer_tokens + 1 for d in depths]
        needed += [settings.prompt_tokens + 1, self._subject.picture_tokens + _ROOM + settings.answer_tokens]
        return min(max(needed), longest or max(needed)), depths

    def _say(self, step: str) -> None:
        self._report(f"{self._subject.label}: {step}")

    def _repeat(self, name: str, measure: Callable[[], float], *, limits: Limits | None = None) -> list[float]:
        self._say(name)
        found = repeat(measure, limits or self._settings.limits_of_pass)
        if found.doubt and self._settings.passes == 1:
            self.notes.append(f"{name} is {found.doubt}")
        if found.disturbed and found.others is not None and self._settings.passes == 1:
            self._others[name] = found.others
        return found.samples

    def note_interference(self) -> None:
        """Say once what other programs took, and whom it slowed down."""
        others = self._watch.others()
        if self._settings.passes > 1 and others is not None and others > environment.BUSY:
            self.notes.append("other programs used the processor meanwhile: too slow, repeat")
        if self._others:
            names, most = ", ".join(self._others), max(self._others.values())
            self.notes.append(f"other programs used up to {most:.0%} of the processor during {names}: too slow, repeat")

    def cold_starts(self, picture: Path, number: int) -> None:
        """The first start on a machine checks the vision tower, so that it doesn't count."""
        wanted, threads = self._settings.starts_in(number), self._settings.threads
        if not wanted:
            return
        if number == 0:
            self._say("first start")
            cold.start(self._subject, picture, n_ctx=self._n_ctx, threads=threads)
        starts: list[cold.ColdStart] = []
        for start in range(wanted):
            self._say(f"cold start {start + 1} of {wanted}")
            starts.append(cold.start(self._subject, picture, n_ctx=self._n_ctx, threads=threads))
        self.metrics["ttft_cold"] = statistics.of_samples("s", [s.ttft_seconds for s in starts])
        self.metrics["peak_memory"] = statistics.of_samples("bytes", [float(s.peak_memory_bytes) for s in starts])
        if not all(s.dropped for s in starts):
            self.notes.append("ttft_cold: this system can't drop files from its cache, so they may have been in memory")

    def load(self) -> None:
        """Load repeatedly, and measure everything else with the last one."""
        subject, directory = self._subject, self._subject.bundle.directory
        options: dict[str, Any] = {"n_threads": self._settings.threads, "n_ctx": self._n_ctx}
        options |= {"image_tokens": subject.image_tokens, "vision_backend": subject.vision_backend, "cache": False}

        def load() -> float:
            with llava_edge.load(directory, **options) as model:
                return model.load_seconds

        limits = self._settings.limits_of_pass
        quick = Limits(min(3, limits.min_repetitions), limits.max_repetitions, limits.max_seconds / 3, limits.spread)
        self.metrics["load"] = statistics.of_samples("s", self._repeat("load", load, limits=quick))
        with llava_edge.load(directory, **options) as model:
            self._encode(model)
            self._prefill(model)
            self._decode(model)
            self._first_token(model)

    def _encode(self, model: llava_edge.Model) -> None:
        def encode() -> float:
            picture = model.open_picture(self._next_picture())
            started = time.perf_counter()
            model.encode(picture)
            return time.perf_counter() - started

        samples = self._repeat("encode", encode)
        self.metrics["encode"] = statistics.of_samples("s", samples)
        self.vision_backend = model.vision_backend or ""
        if "mmproj" in self._subject.weights and self.vision_backend == "mtmd":
            self._mfu("encode_mfu", self._subject.weights["mmproj"].encode_flops(), samples)

    def _prefill(self, model: llava_edge.Model) -> None:
        engine = model.engine
        count = min(self._settings.prompt_tokens, engine.n_ctx - 1)
        tokens = self._tokens(model, count)
        model.cache.clear()
        samples = self._repeat(f"pp{count}", lambda: prefill_seconds(engine, tokens))
        self.metrics[f"pp{count}"] = rate(samples, count)
        flops = self._subject.weights["llm"].prefill_flops()
        for kind in flops:
            flops[kind] *= count
        self._mfu(f"pp{count}_mfu", flops, samples)

    def _decode(self, model: llava_edge.Model) -> None:
        engine, count = model.engine, self._settings.answer_tokens
        tokens = self._tokens(model, count)
        for depth in self._depths:
            model.cache.clear()
            if depth:
                engine.decode_tokens(self._tokens(model, depth), logits=False)

            name, before = f"tg{count}@{depth}", environment.energy_joules()
            samples = self._repeat(name, functools.partial(decode_seconds, engine, tokens, depth))
            self.metrics[name] = rate(samples, count)
            self._energy(name, before, count * (len(samples) + 1))
            self._mbu(f"{name}_mbu", depth + count / 2, count, samples)
        model.cache.clear()

    def _first_token(self, model: llava_edge.Model) -> None:
        def first_token() -> float:
            picture = self._next_picture()
            with model.chat() as chat:
                return chat.ask(cold.QUESTION, images=[picture], max_tokens=1).timings.ttft_seconds

        samples = self._repeat("ttft_warm", first_token)
        self.metrics["ttft_warm"] = statistics.of_samples("s", samples)
        self.metrics["ttft_warm_p95"] = Metric("s", statistics.percentile(samples, 0.95))

    def _mbu(self, name: str, depth: float, count: int, samples: list[float]) -> None:
        read = self._subject.weights["llm"].decode_bytes(depth) * count
        best = read / self._ceilings["read_bandwidth"].value
        self.metrics[name] = statistics.of_samples("share", [best / seconds for seconds in samples])
        if self.metrics[name].value > 1:
            # A model that fits the processor's cache can do it; otherwise the ceiling was measured badly.
            self.notes.append(f"{name} is above 100 %: the ceiling was measured too low, or the model is in a cache")

    def _mfu(self, name: str, flops: Counter[str], samples: list[float]) -> None:
        """Share of the time that the products would take at each type's own ceiling."""
        best = sum(count / self._ceilings[f"matrix_rate {kind}"].value for kind, count in flops.items())
        self.metrics[name] = statistics.of_samples("share", [best / seconds for seconds in samples])

    def _energy(self, name: str, before: float | None, tokens: int) -> None:
        after = environment.energy_joules()
        if before is not None and after is not None and after > before:
            self.metrics[f"{name}_energy"] = Metric("J/token", (after - before) / tokens)

    def _tokens(self, model: llava_edge.Model, count: int) -> list[int]:
        return [int(token) for token in self._random.integers(0, model.engine.n_vocab, count)]

    def _next_picture(self) -> Image.Image:
        self._pictures += 1
        return make_picture(self._pictures)
