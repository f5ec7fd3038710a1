"""The same cases in C and in Python, on the same vision tower, give the same tokens."""

from __future__ import annotations

import json

import conformance
import pytest
from clib import ROOT, command


def test_the_suite_covers_what_it_should():
    cases = conformance.read_cases()["cases"]
    assert len(cases) >= 40
    assert len({case["name"] for case in cases}) == len(cases)


@pytest.mark.slow
def test_c_and_python_give_the_same_tokens(built, library_file, environment, nano, monkeypatch):
    suite = conformance.read_cases()
    runner = built / "llava_edge_conformance"
    done = command(runner, nano, ROOT / "examples", conformance.CASES, env=environment, timeout=1800)
    in_c = {line["name"]: line["found"] for line in map(json.loads, done.stdout.splitlines())}
    monkeypatch.setenv("LLAVA_EDGE_LIBRARY", str(library_file))
    in_python = conformance.run_all(suite["cases"])
    assert in_c == in_python
    if conformance.machine() == suite["recorded_with"]:
        assert in_python == {case["name"]: case["expected"] for case in suite["cases"]}


def test_threads_that_share_a_model_get_the_answers_of_one_alone(built, environment, nano):
    done = command(built / "llava_edge_threads", nano, ROOT / "examples", "1", env=environment, timeout=600)
    assert done.stdout.startswith("12 answers, ")
