"""Judged runs: LLaVA-Bench's relative scores, and ScienceQA's ensembles of a model with a judge.

A judgement is a line of ``reviews.jsonl`` beside the run's answers; what is there is not asked again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.bench.tasks import scienceqa, stats
from llava_edge.bench.tasks.choices import LETTER_INSTRUCTION
from llava_edge.bench.tasks.judge import Judge
from llava_edge.bench.tasks.run import JUDGED, REVIEWS, SUMMARY, Run, writing
from llava_edge.bench.tasks.samples import Record, write_text
from llava_edge.bench.tasks.task import Metrics, grouped
from llava_edge.errors import InputError
from llava_edge.strict_json import parse_object

TEMPERATURE = 0.2
MAX_TOKENS = 1024
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TUTOR = "You answer multiple-choice questions. End your answer with: The answer is X."

_SIGHT = {
    True: (
        "The question is about a picture. You can't see it; sentences that describe it and the boxes of its objects, "
        "as (x1, y1, x2, y2) from 0 to 1 with the origin at the top left, stand above in its place."
    ),
    False: "The question is about a picture. You can't see it; a description of it stands above in its place.",
}
_RULE = (
    "Compare the two assistants' answers to the question above. {sight}\n"
    "Judge how helpful, relevant, accurate and detailed each answer is{stress}, and give each a whole score from 1 to "
    "10; higher is better.\n"
    "Write nothing but the two scores on the first line, Assistant 1's first, with a blank between them.\n"
    "Explain your scores on the lines that follow. Don't favour an answer because it comes first or second."
)
_STRESS = {
    "conv": "",
    "detail": ", above all how completely and correctly it describes the picture",
    "complex": ", above all how sound its reasoning is",
}


@dataclass(frozen=True)
class Review:
    """What a judge made of a sample. ``verdict`` is None where it can't be read.

    ``request_sha256`` is that of what it was asked first, and how: a judgement by other rules is another one.
    """

    id: str
    judge: str
    texts: tuple[str, ...]
    verdict: list[float] | dict[str, str] | None
    request_sha256: str

    @property
    def readable(self) -> bool:
        """Whether the judge's (first) answer could be read."""
        return self.verdict["judge"] != scienceqa.FAILED if isinstance(self.verdict, dict) else self.verdict is not None


def rule(category: str, boxes: bool, rules: dict[str, str]) -> str:
    """What the judge is asked for: from the published rules if they are given, or in our own words."""
    for key in (category, f"llava_bench_{category}") if boxes else (f"llava_bench_{category}", category):
        if key in rules:
            return rules[key]
    if rules:
        raise InputError(f"the file of rules has none for {category}; it has {', '.join(rules)}")
    return _RULE.format(sight=_SIGHT[boxes], stress=_STRESS.get(category, ""))


def read_rules(path: Path) -> dict[str, str]:
    """LLaVA's ``rule.json``: a category's ``prompt``."""
    try:
        root = parse_object(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, InputError) as error:
        raise InputError(f"can't read the rules in {path}: {error}") from None
    return {key: root.object(key).text("prompt") for key in root.raw()}


def review_run(
    run: Run,
    judge: Judge,
    *,
    rules: dict[str, str],
    overwrite: bool,
    step: Callable[[int], None],
    max_tokens: int = MAX_TOKENS,
) -> dict[str, Any]:
    """Let a judge see every answer of a run that it has not seen yet, and write ``judged.json``."""
    with writing(run.folder):
        return _review(run, judge, rules, overwrite, step, max_tokens)


def _review(
    run: Run,
    judge: Judge,
    rules: dict[str, str],
    overwrite: bool,
    step: Callable[[int], None],
    max_tokens: int,
) -> dict[str, Any]:
    reviewers = {"llava-bench": (_comparison, _compare_answers), "scienceqa": (_first_look, _second_look)}
    task = run.settings["task"]
    if task not in reviewers:
        raise InputError(f"a run of {task} needs no judge; one of {', '.join(reviewers)} does")
    if not (run.folder / SUMMARY).is_file():
        raise InputError(f"{run.folder} is not finished", hint="Run it again with --resume first.")
    records = [record for record in run.records if not record.unreadable]
    if not records:
        raise InputError(f"{run.folder} has no answers that can be judged")
    requested, review_of = reviewers[task]
    requests = {record.id: requested(record, rules) for record in records}
    hashes = {name: _request_hash(text, max_tokens) for name, text in requests.items()}
    path = run.folder / REVIEWS
    if overwrite:
        path.unlink(missing_ok=True)
    reviews = {review.id: review for review in _read_reviews(path, judge.name)}
    if any(hashes.get(name) != review.request_sha256 for name, review in reviews.items()):
        raise InputError(
            f"{path} has judgements of other answers, by other rules or of another length",
            hint="--overwrite drops them and asks again.",
        )
    step(len(reviews))
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            if record.id in reviews:
                continue
            said = review_of(record, judge, requests[record.id], max_tokens)
            reviews[record.id] = review = Review(record.id, judge.name, *said, hashes[record.id])
            file.write(json.dumps(asdict(review), ensure_ascii=False) + "\n")
            file.flush()
            step(1)
    ordered = [(record, reviews[record.id]) for record in records]
    metrics = _relative_scores(ordered) if task == "llava-bench" else _ensembles(ordered)
    failed = sum(not review.readable for _, review in ordered)
    judged = {
        "task": task,
        "model": run.settings["model"],
        "judge": judge.name,
        "rules_sha256": hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest() if rules else None,
        "asked": len(ordered),
        "unreadable": failed,
        "skipped": run.settings["skipped"],
        "headline": "relative_score" if task == "llava-bench" else "second_look",
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
    }
    write_text(run.folder / JUDGED, json.dumps(judged, indent=2, ensure_ascii=False) + "\n")
    return judged


def _read_reviews(path: Path, judge: str) -> list[Review]:
    """Judgements that are there already; a torn last line is cut off."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    try:
        reviews = [Review(**json.loads(line)) for line in whole.decode("utf-8").split("\n") if line]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}", hint="--overwrite asks again.") from None
    others = {review.judge for review in reviews} - {judge}
    if others:
        raise InputError(
            f"{path} has judgements of {', '.join(sorted(others))}, not of {judge}",
            hint="--overwrite drops them and asks again.",
        )
    return reviews


def _request_hash(text: str, max_tokens: int) -> str:
    return hashlib.sha256(f"{max_tokens}\n{text}".encode()).hexdigest()


def _comparison(record: Record, rules: dict[str, str]) -> str:
    """What the judge of LLaVA-Bench reads. The reference's answer stands first, as in the paper."""
    facts = record.facts
    request = rule(facts["category"], facts["boxes"], rules)
    answers = "".join(
        f"[Assistant {number}]\n{text}\n\n[End of Assistant {number}]\n\n"
        for number, text in ((1, record.expected), (2, record.answer))
    )
    return f"[Context]\n{facts['context']}\n\n[Question]\n{record.question}\n\n{answers}[System]\n{request}\n\n"


def _compare_answers(record: Record, judge: Judge, text: str, max_tokens: int) -> tuple[tuple[str, ...], Any]:
    said = judge.ask(SYSTEM, text, temperature=TEMPERATURE, max_tokens=max_tokens)
    return (said,), read_scores(said)


def read_scores(text: str) -> list[float] | None:
    """The two scores on a judgement's first line, from 1 to 10; None if there is anything else."""
    words = text.strip().split("\n")[0].replace(",", " ").split()
    try:
        scores = [float(word) for word in words]
    except ValueError:
        return None
    return scores if len(scores) == 2 and all(1 <= score <= 10 for score in scores) else None


def _relative_scores(ordered: Sequence[tuple[Record, Review]]) -> Metrics:
    """100 x mean(candidate) / mean(reference), of all and by category, of the judgements that can be read."""
    rows: dict[str, list[float]] = {r.id: review.verdict for r, review in ordered if isinstance(review.verdict, list)}
    records = [record for record, _ in ordered if record.id in rows]

    def relative(chosen: Sequence[Record]) -> stats.Metric:
        columns = np.array([rows[record.id] for record in chosen], dtype=np.float64).reshape(-1, 2)
        clusters = [record.cluster for record in chosen]
        return stats.bootstrap(clusters, columns, lambda sums: 100 * stats.ratio(sums[1], sums[0]))

    metrics = {"relative_score": relative(records)}
    for category, group in grouped(records, "category").items():
        metrics[f"{category}/relative_score"] = relative(group)
    for place, name in enumerate(("reference", "candidate")):
        metrics[f"mean_{name}"] = stats.mean([r.cluster for r in records], [rows[r.id][place] for r in records])
    return metrics


def _first_look(record: Record, rules: dict[str, str]) -> str:
    return record.question.removesuffix(f"\n{LETTER_INSTRUCTION}")


def _second_look(record: Record, judge: Judge, question: str, max_tokens: int) -> tuple[tuple[str, ...], Any]:
    """The judge answers from the text alone; where it differs from the model, it sees both answers and decides."""
    choices = record.facts["choices"]
    first = judge.ask(TUTOR, question, temperature=0, max_tokens=max_tokens)
    own = scienceqa.read_letter(first.strip(), choices)
    model = record.detail["letter"]
    verdict = {"judge": own, "second": own}
    texts = [first]
    if own != model:
        request = (
            f"{question}\n\nTwo answers were given.\nAnswer 1:\n{first.strip()}\n\nAnswer 2, by someone who saw the "
            f"picture if there is one:\n{record.answer}\n\nDecide, and end with: The answer is X."
        )
        texts.append(judge.ask(TUTOR, request, temperature=0, max_tokens=max_tokens))
        verdict["second"] = scienceqa.read_letter(texts[-1].strip(), choices)
    return tuple(texts), verdict


def _ensembles(ordered: Sequence[tuple[Record, Review]]) -> Metrics:
    """Complement: the judge's answer, the model's where the judge has none. Second look: the judge's after it saw
    both, the model's where it has none.
    """
    right = dict.fromkeys(("model", "judge", "complement", "second_look"), 0)
    for record, review in ordered:
        assert isinstance(review.verdict, dict)
        model, own, second = record.detail["letter"], review.verdict["judge"], review.verdict["second"]
        answers = {
            "model": model,
            "judge": own,
            "complement": model if own == scienceqa.FAILED else own,
            "second_look": model if second == scienceqa.FAILED else second,
        }
        for name, letter in answers.items():
            right[name] += letter == record.expected
    return {name: stats.share(count, len(ordered)) for name, count in right.items()}
