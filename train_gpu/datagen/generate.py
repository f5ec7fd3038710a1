"""Instructions for many pictures, or talks: concurrent, within a budget, and to be taken up again after a stop.

Every finished one is a line in ``OUT.run.jsonl`` at once. The output is made of these lines in the order of what was
asked, so nothing is lost and nothing is there twice, however often a run was stopped.
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
from typing import Any, Protocol

from llava_edge.errors import ContextFullError, InputError, LlavaEdgeError
from llava_edge.train_gpu.datagen.check import Rejected, Turns, accept
from llava_edge.train_gpu.datagen.llm import Completion, Llm, LlmError
from llava_edge.train_gpu.datagen.scenes import Scene
from llava_edge.train_gpu.datagen.tasks import Kind, Message, messages

log = logging.getLogger(__name__)

Say = Callable[[Sequence[Message]], Completion]
"""What a language model says to messages."""


class Job(Protocol):
    """One sample to be made; its name is its own in a run."""

    @property
    def name(self) -> str: ...

    def most_tokens(self, max_tokens: int) -> int:
        """What it costs at most, with answers of so many tokens."""
        ...

    def ask(self, say: Say) -> Turns:
        """Questions and answers; Rejected, if what was said can't be used."""
        ...

    def sample(self, turns: Turns) -> dict[str, Any]:
        """The turns as LLaVA JSON."""
        ...


@dataclass(frozen=True)
class _Picture:
    """Instructions of a kind on what is known of a picture."""

    kind: Kind
    scene: Scene

    @property
    def name(self) -> str:
        return self.scene.image

    def most_tokens(self, max_tokens: int) -> int:
        return sum(len(text) for _, text in messages(self.kind, self.scene)) // 3 + max_tokens

    def ask(self, say: Say) -> Turns:
        completion = say(messages(self.kind, self.scene))
        return accept(self.kind, self.scene, completion.text, cut_off=completion.cut_off)

    def sample(self, turns: Turns) -> dict[str, Any]:
        return about_picture(Path(self.name).stem, self.name, turns)


def conversation(turns: Turns) -> list[dict[str, str]]:
    """Questions and answers as LLaVA JSON has them."""
    return [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]


def about_picture(name: str, image: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """LLaVA JSON of turns about a picture, which stands before the first question."""
    (question, answer), *more = turns
    return {"id": name, "image": image, "conversations": conversation([(f"<image>\n{question}", answer), *more])}


@dataclass
class Statistics:
    """What became of the pictures, or talks. ``stopped`` says why there are some left, if there are."""

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
    """What is finished of an output, on disk, by the name that a record has under ``key``."""

    def __init__(self, output: Path, settings: dict[str, Any], *, resume: bool, key: str = "image") -> None:
        self.key = key
        self.path = output.with_name(output.name + ".run.jsonl")
        self.done: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        if self.path.exists():
            if not resume:
                raise InputError(
                    f"{self.path} holds a run that was stopped", hint="Go on with --resume, or remove this file."
                )
            self._read(digest)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"settings": digest}) + "\n", encoding="utf-8")

    def _read(self, digest: str) -> None:
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the line that a kill cut off; it is asked again
        if not records or records[0].get("settings") != digest:
            raise InputError(
                f"{self.path} is of a run with other settings",
                hint="Give the options of that run, or remove this file to begin again.",
            )
        self.done = {record[self.key]: record for record in records[1:]}
        whole = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(whole, encoding="utf-8")
        partial.replace(self.path)

    def add(self, record: dict[str, Any]) -> None:
        """Keep one that is finished."""
        with self._lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.done[record[self.key]] = record

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
    return ask_all(
        [_Picture(kind, scene) for scene in scenes], llm, output, progress, concurrency=concurrency,
        max_tokens=max_tokens, max_tokens_total=max_tokens_total, told=told,
    )  # fmt: skip


def ask_all(
    jobs: Sequence[Job],
    llm: Llm,
    output: Path,
    progress: Progress,
    *,
    concurrency: int = 4,
    max_tokens: int = 512,
    max_tokens_total: int | None = None,
    told: Callable[[Callable[[], Statistics]], None] = lambda statistics: None,
) -> Statistics:
    """Ask for all that ``progress`` lacks; see :func:`generate`."""
    budget = Budget(max_tokens_total, sum(record["tokens"] for record in progress.done.values()))
    work = _Work(llm, progress, budget, max_tokens, len(jobs))
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        if job.name not in progress.done:
            waiting.put(job)
    try:
        _run(work, waiting, concurrency, lambda: told(work.statistics))
    finally:
        statistics = work.statistics()
        _write(output, [(job, progress.done[job.name]) for job in jobs if job.name in progress.done])
    if not statistics.left and not statistics.failed:
        progress.finish()
    if work.broken is not None:
        raise work.broken
    return statistics


class _Work:
    """What the threads share."""

    def __init__(self, llm: Llm, progress: Progress, budget: Budget, max_tokens: int, count: int) -> None:
        self.llm, self.progress, self.budget, self.max_tokens, self.count = llm, progress, budget, max_tokens, count
        self.errors: dict[str, str] = {}
        self.stopped: str | None = None
        self.broken: Exception | None = None

    def one(self, job: Job) -> None:
        """Ask for one sample and keep what came of it."""
        most = job.most_tokens(self.max_tokens)
        if not self.budget.reserve(most):
            self.stopped = "the budget of tokens is spent"
            return
        said: list[Completion] = []

        def say(asked: Sequence[Message]) -> Completion:
            said.append(self.llm.complete(asked, self.max_tokens))
            return said[-1]

        record: dict[str, Any] = {self.progress.key: job.name}
        try:
            record["turns"] = job.ask(say)
        except Rejected as reason:
            record |= {"reason": str(reason), "text": said[-1].text}
        except (LlmError, ContextFullError) as error:
            self.errors[job.name] = str(error)
            return
        finally:
            record["tokens"] = sum(completion.tokens for completion in said)
            self.budget.settle(most, record["tokens"])
        self.progress.add(record)

    def statistics(self) -> Statistics:
        """How far it is."""
        done = list(self.progress.done.values())
        turns = [turn for record in done for turn in record.get("turns", ())]
        counted = Statistics(
            pictures=self.count,
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


def _run(work: _Work, waiting: queue.SimpleQueue[Job], concurrency: int, told: Callable[[], None]) -> None:
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


def _write(output: Path, finished: list[tuple[Job, dict[str, Any]]]) -> None:
    samples = [job.sample(record["turns"]) for job, record in finished if "turns" in record]
    rejects = [record for _, record in finished if "turns" not in record]
    write_json(output, samples)
    replace_text(
        output.with_name(output.name + ".rejects.jsonl"),
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rejects),
    )


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON, whole or not at all; LlavaEdgeError if they can't be written."""
    replace_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; LlavaEdgeError if it can't be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise LlavaEdgeError(f"can't write {path}: {error.strerror}") from None
