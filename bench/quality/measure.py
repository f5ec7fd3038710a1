"""Reference and candidates over the same data: distributions along known answers, and answers of their own."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import llava_edge
from llava_edge import native
from llava_edge.bench import environment
from llava_edge.bench.models import Subject
from llava_edge.bench.progress import Progress, Say
from llava_edge.bench.quality import scores
from llava_edge.bench.quality.cases import CHUNK, Case, evaluate_text, make_cases
from llava_edge.bench.quality.data import Data
from llava_edge.bench.quality.store import EmbeddingStore, LogitStore, compact, key_of, make_folder, versions, written
from llava_edge.bench.record import Metric, Result, with_metrics, write_atomically, write_so_far
from llava_edge.engine import DEFAULT_CTX, Engine
from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.generate import Generation, generate
from llava_edge.sampling import Sampler
from llava_edge.types import SamplingParams
from llava_edge.vision.backends import candidates

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_LAYOUT = 2  # of the cache: what it holds is computed in another way than by earlier versions


@dataclass(frozen=True)
class QualitySettings:
    """What to measure. ``own_answers`` is the number of samples that the models also answer by themselves."""

    threads: int = field(default_factory=native.default_threads)
    answer_tokens: int = 64
    own_answers: int = 100
    own_answer_tokens: int = 40
    text_chunks: int | None = 20

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("answer_tokens", 1), ("own_answers", 0), ("own_answer_tokens", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected {least} or more")


def bench_quality(
    subjects: Sequence[Subject],
    reference: Subject,
    data: Data,
    settings: QualitySettings,
    cache: Path,
    say: Say = log.info,
    output: Path | None = None,
) -> Result:
    """Measure every bundle against the reference. What the reference said is kept in ``cache``.

    After each bundle the record is written to ``output``.
    """
    for subject in (reference, *subjects):
        check_variant(subject, reference)
    quality = Quality(reference, data, settings, cache, say)
    if len(subjects) > 1:
        quality.check(subjects)
    result = environment.result("quality", (), quality.facts)
    for subject in subjects:
        row = with_metrics(subject.row(), quality.measure(subject))
        row = replace(row, vision_backend=quality.vision_backends.get(subject.label, ""))
        result = environment.result("quality", (*result.rows, row), quality.facts)
        write_so_far(output, result, say)
    return result


def check_variant(subject: Subject, reference: Subject) -> None:
    """Refuse random weights, and whatever the reference's distributions say nothing about."""
    if subject.synthetic:
        raise InputError(f"{subject.label} has random weights: its answers and its quality mean nothing")
    ours, theirs = subject.bundle.manifest, reference.bundle.manifest
    facts: list[tuple[str, Any, Any]] = [
        ("family", ours.family, theirs.family),
        ("prompt format", ours.prompt, theirs.prompt),
        ("picture size", ours.image.size, theirs.image.size),
        ("number of visual tokens", subject.image_tokens, reference.image_tokens),
        ("vocabulary", _embedding_shape(subject)[-1], _embedding_shape(reference)[-1]),
        ("width", _embedding_shape(subject)[0], _embedding_shape(reference)[0]),
        ("number of layers", subject.weights["llm"].layers, reference.weights["llm"].layers),
    ]
    for name, mine, other in facts:
        if mine != other:
            told = f" ({mine}, not {other})" if isinstance(mine, (int, str)) else ""
            raise InputError(
                f"{subject.label} is no variant of the reference {reference.label}: its {name} is another one{told}",
                hint="Compare bundles that were made of the same checkpoint.",
            )


def _embedding_shape(subject: Subject) -> tuple[int, ...]:
    """Width and size of the vocabulary."""
    tensors = subject.weights["llm"].tensors
    return next((t.shape for t in tensors if t.name == "token_embd.weight"), (0, 0))


class Quality:
    """The data, and the reference's view of it, which is computed once and kept."""

    def __init__(self, reference: Subject, data: Data, settings: QualitySettings, cache: Path, say: Say) -> None:
        self._reference = reference
        self._data = data
        self._settings = settings
        self._say = say
        self._embeddings = EmbeddingStore(cache / "embeddings")
        files = [file.sha256 for file in reference.bundle.manifest.files]
        manifest = reference.bundle.manifest
        read = [manifest.prompt, manifest.image, manifest.feature_layers, manifest.backends, reference.vision_backend]
        facts = [
            _LAYOUT,
            files,
            *read,
            reference.image_tokens,
            data.sha256,
            asdict(settings),
            *versions(candidates(reference.bundle, reference.vision_backend)),
        ]
        self._folder = make_folder(cache / f"reference-{key_of(facts)}")
        self._logits = LogitStore(self._folder / "logits")
        self._cases: list[Case] = []
        self._texts: list[str] | None = None
        self.vision_backends: dict[str, str] = {}
        """What read the pictures, by the subject's label."""

    @property
    def facts(self) -> dict[str, Any]:
        """The settings for the record."""
        data = {"data": self._data.source, "data_sha256": self._data.sha256, "samples": len(self._data.samples)}
        files = {file.role: file.sha256 for file in self._reference.bundle.manifest.files}
        return {**asdict(self._settings), **data, "reference": self._reference.label, "reference_sha256": files}

    def check(self, subjects: Sequence[Subject]) -> None:
        """Refuse before the first is measured what would fail at the last."""
        self._prepare()
        for subject in subjects:
            with self._load(subject) as model:
                self._cases_of(model, subject)

    def _cases_of(self, model: llava_edge.Model, subject: Subject) -> list[Case]:
        """The cases, which have to be those of the reference."""
        cases = self._make_cases(model)
        if [(c.units, c.answer) for c in cases] != [(c.units, c.answer) for c in self._cases]:
            raise InputError(f"{subject.label} cuts the answers into other tokens than the reference")
        return cases

    def measure(self, subject: Subject) -> dict[str, Metric]:
        """All figures of one bundle."""
        self._prepare()
        groups: dict[str, list[NDArray[np.float64]]] = {}
        with self._load(subject) as model, self._at_once(subject) as engine:
            cases = self._cases_of(model, subject)
            progress = Progress(f"{subject.label}: answers", len(cases), self._say)
            texts = []
            for number, case in enumerate(cases):
                rows = self._evaluate(model, subject, case) if engine is None else evaluate_text(engine, case)
                expected = self._logits.load(number, (len(case.answer), model.engine.n_vocab))
                if expected is None:
                    raise LlavaEdgeError(
                        f"the reference's logits in {self._folder} are damaged", hint="Delete that folder."
                    )
                groups.setdefault(case.group, []).append(scores.compare(expected, rows, case.answer))
                if self._answers_itself(case):
                    texts.append(self._answer(model, subject, case))
                progress.step()
        return {**scores.summarize([np.concatenate(parts) for parts in groups.values()]), **self._judge(texts)}

    def _judge(self, texts: list[str]) -> dict[str, Metric]:
        if not texts or self._texts is None:
            return {}
        pictures = [case.group for case in self._cases if self._answers_itself(case)]
        found = {"same_text": scores.same_text(texts, self._texts, pictures)}
        references = [sample.references for sample in self._data.samples[: len(texts)]]
        if self._data.short:
            found["accuracy"] = scores.accuracy(texts, references, pictures)
        elif self._data.captions and len(texts) > 1:
            found["cider_d"] = scores.captions(texts, references, pictures)
        return found

    def _prepare(self) -> None:
        """The reference's logits and answers, those that aren't there from an earlier run."""
        if self._cases:
            return
        kept = self._folder / "answers.json"
        reference = self._reference
        with self._load(reference) as model, self._at_once(reference) as engine:
            self._cases = self._make_cases(model)
            missing = [n for n in range(len(self._cases)) if not self._logits.has(n)]
            progress = Progress(f"reference {self._reference.label}: answers", len(missing), self._say)
            for number in missing:
                case = self._cases[number]
                rows = self._evaluate(model, reference, case) if engine is None else evaluate_text(engine, case)
                self._logits.save(number, rows)
                progress.step()
            asked = [case for case in self._cases if self._answers_itself(case)]
            self._texts = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
            if self._texts is None:
                progress = Progress(f"reference {self._reference.label}: own answers", len(asked), self._say)
                self._texts = []
                for case in asked:
                    self._texts.append(self._answer(model, self._reference, case))
                    progress.step()
                with written(kept):
                    write_atomically(kept, json.dumps(self._texts, ensure_ascii=False))

    def _load(self, subject: Subject) -> llava_edge.Model:
        self._say(f"{subject.label}: quality")
        threads = self._settings.threads
        options: dict[str, Any] = {
            "n_threads": threads,
            "n_ctx": self._n_ctx(subject),
            "image_tokens": subject.image_tokens,
            "cache": False,
        }
        model = llava_edge.load(subject.bundle.directory, **options, vision_backend=subject.vision_backend)
        if self._data.text is None:
            self.vision_backends[subject.label] = model.open_vision()
        return model

    def _n_ctx(self, subject: Subject) -> int | None:
        """Room for a large picture too; None is the usual context."""
        longest, needed = subject.weights["llm"].context_length, subject.picture_tokens + DEFAULT_CTX // 2
        return min(needed, longest or needed) if needed > DEFAULT_CTX else None

    @contextmanager
    def _at_once(self, subject: Subject) -> Iterator[Engine | None]:
        """For a text: the language model alone, which gives the logits of all tokens of a batch."""
        if self._data.text is None:
            yield None
            return
        threads = self._settings.threads
        engine = Engine(subject.bundle.file("llm"), n_ctx=CHUNK, n_batch=CHUNK, n_threads=threads, every_output=True)
        try:
            yield engine
        finally:
            engine.close()

    def _make_cases(self, model: llava_edge.Model) -> list[Case]:
        settings = self._settings
        return make_cases(model, self._data, answer_tokens=settings.answer_tokens, chunks=settings.text_chunks)

    def _answers_itself(self, case: Case) -> bool:
        return case.asks and case.sample < self._settings.own_answers

    def _prefill(self, model: llava_edge.Model, subject: Subject, case: Case) -> None:
        known = {}
        if case.picture is not None:
            known[str(case.picture)] = self._embeddings.get(model, subject, case.picture)
        model.cache.prefill(case.units, known)

    def _evaluate(self, model: llava_edge.Model, subject: Subject, case: Case) -> NDArray[np.float16]:
        """Compact logits before each token of the answer, evaluated one by one as in a chat."""
        self._prefill(model, subject, case)
        rows = [model.cache.logits()]
        for token in case.answer[:-1]:
            model.cache.append(token)
            rows.append(model.cache.logits())
        return compact(np.stack(rows))

    def _answer(self, model: llava_edge.Model, subject: Subject, case: Case) -> str:
        """What the model says by itself, greedily."""
        self._prefill(model, subject, case)
        generation = Generation()
        loop = model.token_loop(generation, Sampler(SamplingParams()), self._settings.own_answer_tokens)
        pieces = generate(loop, model.cache)
        for _ in pieces:
            pass
        return generation.text.strip()
