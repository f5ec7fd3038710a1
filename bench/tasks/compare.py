"""Are two models different? Tests on the same samples, pair by pair."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from llava_edge.bench.tasks.run import Run
from llava_edge.bench.tasks.stats import bootstrap, mcnemar
from llava_edge.errors import InputError


def compare(first: Run, second: Run) -> dict[str, Any]:
    """The mean difference of scores (second minus first) with its paired bootstrap interval over pictures.

    Where every score is 0 or 1, McNemar's exact test is there too; a question that a benchmark asks several times (POPE
    does) counts once there. Samples that only one run has, or that one could not mark, are left out and counted.
    """
    if first.settings["task"] != second.settings["task"]:
        raise InputError(
            f"{first.folder} is a run of {first.settings['task']}, {second.folder} of {second.settings['task']}"
        )
    if first.settings["task"] == "captions" and first.settings["data_sha256"] != second.settings["data_sha256"]:
        raise InputError(
            "the runs are on different pictures, and how rare a word is depends on all of them",
            hint="Run both with the same --limit.",
        )
    theirs = {record.id: record for record in second.records}
    pairs = [(record, theirs[record.id]) for record in first.records if record.id in theirs]
    for one, other in pairs:
        if one.image != other.image or one.expected != other.expected:
            raise InputError(f"the runs are on different data: sample {one.id} differs in its picture or its answer")
    marked = [(a, b) for a, b in pairs if a.score is not None and b.score is not None]
    if not marked:
        raise InputError("the runs have no marked sample in common")
    clusters = [a.cluster for a, _ in marked]
    scores = np.array([[a.score, b.score] for a, b in marked], dtype=np.float64)
    rows = np.column_stack([scores[:, 1] - scores[:, 0], np.ones(len(scores))])
    difference = bootstrap(clusters, rows, lambda sums: float(sums[0] / sums[1]))
    result: dict[str, Any] = {
        "task": first.settings["task"],
        "first": first.settings["model"]["name"],
        "second": second.settings["model"]["name"],
        "samples": len(marked),
        "left_out": len(first.records) + len(second.records) - 2 * len(marked),
        "same_answer": sum(a.answer == b.answer for a, b in marked),
        "mean_first": float(scores[:, 0].mean()),
        "mean_second": float(scores[:, 1].mean()),
        "difference": asdict(difference),
        "mcnemar": None,
    }
    if set(np.unique(scores)) <= {0.0, 1.0}:
        once = {(a.cluster, a.question, str(a.expected)): (a.score, b.score) for a, b in marked}
        only_first, only_second = list(once.values()).count((1, 0)), list(once.values()).count((0, 1))
        p_value = mcnemar(only_first, only_second)
        result["mcnemar"] = {"only_first": only_first, "only_second": only_second, "p_value": p_value}
    return result
