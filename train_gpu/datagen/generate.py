"""Instructions for many pictures: concurrent, within a budget, and to be taken up again after a stop.

Every finished picture is a line in ``OUT.run.jsonl`` at once. The output is made of these lines in the pictures'
order, so nothing is lost and nothing is there twice, however often a run was stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_edge.errors import ContextFullError, InputError, LlavaEdgeError
from llava_edge.train_gpu.datagen.check import Rejected, accept
from llava_edge.train_gpu.datagen.llm import Llm, LlmError
from llava_edge.train_gpu.datagen.scenes import Scene
from llava_edge.train_gpu.datagen.tasks import Kind, messages

log = logging.getLogger(__name__)


@dataclass
class Statistics:
    """What became of the pictures. ``stopped`` says why there are some left, if there are."""

    pictures: int
    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    left: int = 0
    questions: int = 0
    tokens: int = 0
    answer_words_mean: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None


class Budget:
    """Tokens that may still be spent. What is under way is counted with its largest cost."""

    def __init__(self, total: int | None, spent: int) -> None:
        self.total = total
        self.spent = spent
        self._reserved = 0
        self._lock = threading.Lock()

    def reserve(self, tokens: int) -> bool:
        """Whether a request of at most so many tokens may begin."""
        with self._lock:
            if self.total is not None and self.spent + self._reserved + tokens > self.total:
                return False
            self._reserved += tokens
            return True

    def settle(self, reserved: int, spent: int) -> None:
        """Replace a reservation by what it has cost."""
        with self._lock:
            self._reserved -= reserved
            self.spent += spent


class Progress:
    """The finished pictures of an output, on disk."""

    def __init__(self, output: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.path = output.with_name(output.name + ".run.jsonl")
        self.done: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        if self.path.exists():
            if not resume:
                raise InputError(
                    f"{self.path} holds a run that was stopped", hint="Go on with --resume, or remove this file."
                )
            self._read(key)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"settings": key}) + "\n", encoding="utf-8")

    def _read(self, key: str) -> None:
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the line that a kill cut off; its picture is asked again
        if not records or records[0].get("settings") != key:
            raise InputError(
                f"{self.path} is of a run with other settings",
                hint="Give the options of that run, or remove this file to begin again.",
            )
        self.done = {record["image"]: record for record in records[1:]}
        whole = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(whole, encoding="utf-8")
        partial.replace(self.path)

    def add(self, record: dict[str, Any]) -> None:
        """Keep one finished picture."""
        with self._lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.done[record["image"]] = record

    def finish(self) -> None:
        """Forget the run, once everything is in the output."""
        self.path.unlink()


def generate(
    kind: Kind,
    scenes: Sequence[Scene],
    llm: Llm,
    output: Path,
    *,
    concurrency: int = 4,
    max_tokens: int = 512,
    max_tokens_total: int | None = None,
    resume: bool = False,
    settings: dict[str, Any] | None = None,
    told: Callable[[Callable[[], Statistics]], None] = lambda statistics: None,
) -> Statistics:
    """Ask for every scene and write ``output`` (LLaVA JSON) and ``output.rejects.jsonl``.

    ``settings`` is what a resumed run must have in common with the stopped one. ``told`` hears of every finished
    picture; what it is given tells how far the run is, and reads all that is finished to do so. Pictures whose request
    failed for good are counted and left for a later ``resume``.
    """
    names = [scene.image for scene in scenes]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"the picture {twice[0]} is there {Counter(names)[twice[0]]} times")
    progress = Progress(output, {"kind": kind, "pictures": names, **(settings or {})}, resume=resume)
    budget = Budget(max_tokens_total, sum(record["tokens"] for record in progress.done.values()))
    work = _Work(kind, llm, progress, budget, max_tokens)
    waiting: queue.SimpleQueue[Scene] = queue.SimpleQueue()
    for scene in scenes:
        if scene.image not in progress.done:
            waiting.put(scene)
    try:
        _run(work, waiting, concurrency, lambda: told(lambda: work.statistics(scenes)))
    finally:
        statistics = work.statistics(scenes)
        _write(output, [progress.done[name] for name in names if name in progress.done])
    if not statistics.left and not statistics.failed:
        progress.finish()
    if work.broken is not None:
        raise work.broken
    return statistics


class _Work:
    """What the threads share."""

    def __init__(self, kind: Kind, llm: Llm, progress: Progress, budget: Budget, max_tokens: int) -> None:
        self.kind, self.llm, self.progress, self.budget, self.max_tokens = kind, llm, progress, budget, max_tokens
        self.errors: dict[str, str] = {}
        self.stopped: str | None = None
        self.broken: Exception | None = None

    def one(self, scene: Scene) -> None:
        """Ask about one picture and keep what came of it."""
        asked = messages(self.kind, scene)
        most = sum(len(text) for _, text in asked) // 3 + self.max_tokens
        if not self.budget.reserve(most):
            self.stopped = "the budget of tokens is spent"
            return
        spent = 0
        try:
            completion = self.llm.complete(asked, self.max_tokens)
            spent = completion.tokens
        except (LlmError, ContextFullError) as error:
            self.errors[scene.image] = str(error)
            return
        finally:
            self.budget.settle(most, spent)
        record: dict[str, Any] = {"image": scene.image, "tokens": spent}
        try:
            record["turns"] = accept(self.kind, scene, completion.text, cut_off=completion.cut_off)
        except Rejected as reason:
            record |= {"reason": str(reason), "text": completion.text}
        self.progress.add(record)

    def statistics(self, scenes: Sequence[Scene]) -> Statistics:
        """How far it is."""
        done = list(self.progress.done.values())
        turns = [turn for record in done for turn in record.get("turns", ())]
        counted = Statistics(
            pictures=len(scenes),
            accepted=sum("turns" in record for record in done),
            rejected=sum("reason" in record for record in done),
            failed=len(self.errors),
            questions=len(turns),
            tokens=self.budget.spent,
            answer_words_mean=sum(len(answer.split()) for _, answer in turns) / len(turns) if turns else 0.0,
            reasons=dict(Counter(record["reason"] for record in done if "reason" in record).most_common()),
            errors=dict(self.errors),
            stopped=self.stopped,
        )
        counted.left = counted.pictures - counted.accepted - counted.rejected - counted.failed
        return counted


def _run(work: _Work, waiting: queue.SimpleQueue[Scene], concurrency: int, told: Callable[[], None]) -> None:
    """Work the queue off with daemon threads, so that an interruption need not wait for slow answers."""
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def loop() -> None:
        try:
            while work.stopped is None and work.broken is None:
                work.one(waiting.get_nowait())
                told()
        except queue.Empty:
            pass
        except Exception as error:
            work.broken = error
        finally:
            ended.put(None)

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            ended.get()
    except KeyboardInterrupt:
        work.stopped = "interrupted"
        raise


def _write(output: Path, records: list[dict[str, Any]]) -> None:
    samples, rejects = [], []
    for record in records:
        if "turns" not in record:
            rejects.append(record)
            continue
        said = []
        for number, (question, answer) in enumerate(record["turns"]):
            said.append({"from": "human", "value": question if number else f"<image>\n{question}"})
            said.append({"from": "gpt", "value": answer})
        name = record["image"]
        samples.append({"id": Path(name).stem, "image": name, "conversations": said})
    replace_text(output, json.dumps(samples, indent=1, ensure_ascii=False) + "\n")
    replace_text(
        output.with_name(output.name + ".rejects.jsonl"),
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rejects),
    )


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; LlavaEdgeError if it can't be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise LlavaEdgeError(f"can't write {path}: {error.strerror}") from None
