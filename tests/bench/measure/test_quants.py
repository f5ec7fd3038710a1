from __future__ import annotations

import bisect
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_edge.bench import environment
from llava_edge.bench.models import open_subject
from llava_edge.bench.quality.data import read_data
from llava_edge.bench.quality.measure import QualitySettings
from llava_edge.bench.quants import make
from llava_edge.bench.quants.plan import (
    QuantsSettings,
    Tower,
    Variant,
    check_space,
    reference_tower,
    towers,
    variants,
)
from llava_edge.bench.quants.recommend import pareto, recommend
from llava_edge.bench.quants.run import bench_quants
from llava_edge.bench.record import Metric, ModelFile, Result, Row, read_result, write_atomically
from llava_edge.bench.report.compare import compare, markdown
from llava_edge.bench.report.files import write_report
from llava_edge.bench.report.html import page
from llava_edge.bench.speed.measure import SpeedSettings
from llava_edge.bench.speed.repeat import Limits
from llava_edge.bench.statistics import of_samples
from llava_edge.bundle import Bundle, BundleFile, open_bundle
from llava_edge.errors import InputError

SETTINGS = QuantsSettings(
    ("Q8_0", "q4_0"),
    ("F16", "Q8_0"),
    SpeedSettings(1, 16, 4, (0,), 0, limits=Limits(2, 2, 5)),
    QualitySettings(threads=1, own_answer_tokens=6),
)


@pytest.fixture(scope="module")
def output(f16_bundle: Path, captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quants")
    result = bench_quants(f16_bundle, folder, SETTINGS, read_data(captions, None), keep=True)
    write_report(result, folder, "What quantisation costs: <tiny>")
    return folder


@pytest.fixture(scope="module")
def result(output: Path) -> Result:
    return read_result(output / "report.json")


def labels(result: Result) -> list[str]:
    return [row.label for row in result.rows]


def test_every_pair_of_types_is_measured_and_the_reference_too(result: Result) -> None:
    assert labels(result) == ["F16 / F16", "Q8_0 / F16", "Q8_0 / Q8_0", "Q4_0 / F16", "Q4_0 / Q8_0"]
    for row in result.rows:
        assert {"kl_mean", "perplexity_ratio", "same_text", "cider_d", "ttft_warm", "tg4@0"} <= set(row.metrics)
    assert result.rows[0].metrics["kl_mean"].value == 0
    assert result.rows[3].files[0].tensors["Q4_0"] > 10
    assert {"matrix_rate F16", "matrix_rate Q8_0", "matrix_rate Q4_0"} <= set(result.ceilings)


def test_kept_bundles_can_be_run_and_say_what_they_are(output: Path) -> None:
    bundle = open_bundle(output / "work" / "bundles" / "Q4_0-Q8_0")
    bundle.verify()
    assert [file.type for file in bundle.manifest.files] == ["Q4_0", "Q8_0"]


def test_the_report_is_there_in_every_format(output: Path, result: Result) -> None:
    assert {path.name for path in output.iterdir()} == {
        "report.json", "report.csv", "report.md", "report.html", "size-quality.png", "ttft-accuracy.png", "work",
    }  # fmt: skip
    lines = (output / "report.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["label", *labels(result)]
    assert "![size-quality.png](size-quality.png)" in (output / "report.md").read_text()
    assert (output / "size-quality.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(output: Path, result: Result) -> None:
    text = (output / "report.html").read_text()
    assert "&lt;tiny&gt;" in text
    assert "<tiny>" not in text
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    assert text.count("data:image/svg+xml;base64,") == 2
    evil = replace(result.rows[0], label='"><script>alert(1)</script>')
    assert "<script" not in page(replace(result, rows=(evil,)), "x")


def test_a_finished_run_is_not_measured_again(output: Path, result: Result, f16_bundle: Path, captions: Path) -> None:
    said: list[str] = []
    again = bench_quants(f16_bundle, output, SETTINGS, read_data(captions, None), keep=True, say=said.append)
    assert said == ["5 of 5 are measured already"]
    assert again.rows == result.rows
    assert again.ceilings == result.ceilings


def test_another_run_in_the_same_place_is_refused(output: Path, f16_bundle: Path, captions: Path) -> None:
    other = replace(SETTINGS, types=("Q8_0",))
    with pytest.raises(InputError, match=r"holds a run with other settings: its types is \['Q8_0', 'Q4_0'\]"):
        bench_quants(f16_bundle, output, other, read_data(captions, None))


def test_a_killed_run_ends_in_the_same_table(f16_bundle: Path, captions: Path, tmp_path: Path) -> None:
    """Killed after ever more lines of progress, that is in every kind of step."""
    command = [sys.executable, "-m", "llava_edge", "bench", "quants", f16_bundle, "--types", "Q4_0", "--data", captions]
    command += ["--task", f"captions={captions.parent}", "--task-limit", "2"]
    command += ["--pp", "16", "--tg", "4", "--depth", "0", "--passes", "2", "--cold-starts", "0", "--threads", "1"]
    environment = {**os.environ, "PYTHONUTF8": "1"}

    def start(name: str) -> Any:
        arguments = [*map(str, command), "-o", str(tmp_path / name)]
        return subprocess.Popen(
            arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )

    for at in (2, 7, 4, 1, 9, "pass 2 of 2", 3, "F16 / F16: quality", "Q4_0-Q8_0", "Q4_0 / Q8_0: quality"):
        with start("killed") as child:
            for number, line in enumerate(child.stderr, start=1):
                if number == at or (isinstance(at, str) and at in line):
                    break
            else:
                pytest.fail(f"the run was over before it said {at!r}")
            child.kill()
    for name in ("killed", "whole"):
        with start(name) as child:
            said = child.stderr.read()
        assert child.returncode == 0, said
    killed, whole = (read_result(tmp_path / name / "report.json") for name in ("killed", "whole"))
    quality = ("kl_mean", "kl_p99", "top1_agreement", "perplexity", "perplexity_ratio", "same_text", "cider_d")
    quality += ("captions cider_d",)
    for one, other in zip(killed.rows, whole.rows, strict=True):
        assert (one.label, one.files, set(one.metrics)) == (other.label, other.files, set(other.metrics))
        assert [one.metrics[name] for name in quality] == [other.metrics[name] for name in quality]
        assert {len(one.metrics[name].samples) for name in ("encode", "pp16", "tg4@0", "ttft_warm")} == {2}
    assert {len(metric.samples) for metric in killed.ceilings.values()} == {2}
    assert {path.name for path in (tmp_path / "killed" / "work").iterdir()} == {
        "ceilings.json",
        "measured.json",
        "rows",
        "settings.json",
    }


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"types": ("Q5_K_X",)}, "'Q5_K_X' is no type for this file"),
        ({"mmproj_types": ("IQ4_NL",)}, "'IQ4_NL' is no type for this file"),
        ({"types": ()}, "types is empty"),
    ],
)
def test_unknown_types_are_named_before_anything_is_made(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        QuantsSettings(**settings)


def test_sources_that_cannot_be_quantised_are_refused(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    files = tuple(replace(file, type="Q8_0") for file in open_bundle(make_bundle()).manifest.files)
    cases = (
        (make_bundle(files=files), "its llm is Q8_0, F16 or BF16 or F32 is needed"),
        (make_bundle(family="synthetic"), "has random weights"),
        (tmp_path / "gone", "no such bundle or checkpoint"),
    )
    for source, says in cases:
        with pytest.raises(InputError, match=says):
            bench_quants(source, tmp_path / "out", SETTINGS, None)


def test_nothing_begins_without_room(
    f16_bundle: Path, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(100, 99, 1))
    with pytest.raises(InputError, match=r"GB are needed in .*, 0\.0 GB are free"):
        bench_quants(f16_bundle, tmp_path, SETTINGS, read_data(captions, None))
    assert not list((tmp_path / "work").glob("rows/*"))


def test_a_stopped_run_keeps_to_its_processor_and_its_time(
    f16_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, types=("Q8_0",), mmproj_types=("F16",))
    whole = bench_quants(f16_bundle, tmp_path, settings, None)
    monkeypatch.setattr(environment, "utc_now", lambda: "2000-01-01T00:00:00Z")
    monkeypatch.setattr(environment, "power_source", lambda: "another one")
    again = bench_quants(f16_bundle, tmp_path, settings, None)
    assert (again.created_utc, again.machine, again.warnings) == (whole.created_utc, whole.machine, whole.warnings)
    (tmp_path / "work" / "rows" / "Q8_0-F16.json").unlink()
    more = bench_quants(f16_bundle, tmp_path, settings, None)
    assert (more.created_utc, more.machine) == ("2000-01-01T00:00:00Z", whole.machine)
    assert any("another power source" in warning for warning in more.warnings)
    other = replace(whole.machine, cpu="another one")
    monkeypatch.setattr(environment, "machine", lambda: other)
    with pytest.raises(InputError, match="holds a run with other settings: its cpu is"):
        bench_quants(f16_bundle, tmp_path, settings, None)


def test_what_is_made_already_needs_no_room(
    output: Path, f16_bundle: Path, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    reference, data, work = open_subject(f16_bundle), read_data(captions, None), output / "work"

    def passes(folder: Path, free: int) -> bool:
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 0, free))
        try:
            check_space(SETTINGS, variants(SETTINGS, reference.bundle), reference, data, folder, keep=True)
        except InputError:
            return False
        return True

    needed = bisect.bisect_left(range(10**8), True, key=lambda free: passes(tmp_path, free))
    made = sum(path.stat().st_size for path in (work / "parts").iterdir())
    assert 0 < made < needed
    assert passes(work, needed - made)


def test_a_checkpoint_is_not_converted_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from llava_edge.convert import tiny

    checkpoint = tiny.make(tiny.Family(), tmp_path / "checkpoint")
    work = tmp_path / "out" / "work"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 0))
    with pytest.raises(InputError, match=r"about 0\.0 GB are needed in .*, 0\.0 GB are free"):
        bench_quants(checkpoint, tmp_path / "out", SETTINGS, None)
    assert list(work.iterdir()) == []


def test_another_checkpoints_conversion_is_refused(f16_bundle: Path, tmp_path: Path) -> None:
    checkpoint, work = tmp_path / "checkpoint", tmp_path / "out" / "work"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    shutil.copytree(f16_bundle, work / "reference")
    with pytest.raises(InputError, match="its reference was not made of"):
        make.convert_source(checkpoint, work, SETTINGS, None, print)
    write_atomically(work / "source.json", json.dumps(make.identity(checkpoint), indent=1))
    assert make.convert_source(checkpoint, work, SETTINGS, None, print).bundle.directory == work / "reference"
    (checkpoint / "report.json").write_text("{}")
    make.convert_source(checkpoint, work, SETTINGS, None, print)
    (checkpoint / "model.safetensors").write_bytes(b"weights after more training")
    with pytest.raises(InputError, match="its reference was not made of"):
        make.convert_source(checkpoint, work, SETTINGS, None, print)


def test_a_folder_of_somebody_else_is_not_touched(f16_bundle: Path, tmp_path: Path) -> None:
    for name, content in (("thesis.tex", "years"), ("settings.json", "{}"), ("rows", "")):
        work = tmp_path / name / "work"
        work.mkdir(parents=True)
        (work / name).write_text(content)
        for restart in (False, True):
            with pytest.raises(InputError, match=f"is not a folder of this command: it holds {name}"):
                bench_quants(f16_bundle, work.parent, SETTINGS, None, restart=restart)
        assert (work / name).read_text() == content
        assert len(list(work.iterdir())) == 1


def test_restart_deletes_nothing_before_the_source_is_known(output: Path, tmp_path: Path) -> None:
    work = shutil.copytree(output / "work", tmp_path / "work")
    before = sorted(work.rglob("*"))
    cases = (
        (tmp_path / "gone", "no such bundle or checkpoint"),
        (work / "bundles" / "F16-F16", "--restart would delete"),
        (tmp_path, "config.json"),
    )
    for source, says in cases:
        with pytest.raises(InputError, match=says):
            bench_quants(source, tmp_path, SETTINGS, None, restart=True)
    assert sorted(work.rglob("*")) == before


def row(label: str, size: int, divergence: float, seconds: float, memory: float, perplexity: float = 1.0) -> Row:
    metrics = {
        "kl_mean": Metric("nats", divergence, (divergence - 0.001, divergence + 0.001)),
        "perplexity_ratio": Metric("ratio", perplexity, (perplexity - 0.001, perplexity + 0.001)),
        "ttft_warm": Metric("s", seconds),
        "tg64@0": Metric("tokens/s", 63.0),
        "peak_memory": Metric("bytes", memory),
    }
    file = replace(FILE, bytes=size)
    return Row(label, "x", "llava", 32, 4, (file,), metrics)


FILE = ModelFile("llm", "x.gguf", "F16", 0, "", {})


def test_recommendations_follow_their_rules() -> None:
    rows = [
        row("F16", 1000, 0.0, 3.0, 9e9),
        row("Q8_0", 500, 0.002, 2.0, 5e9),
        row("Q6_K", 400, 0.0095, 1.0, 3e9),  # its interval ends above 0.01
        row("Q4_0", 300, 0.04, 0.5, 2e9),
        row("bad", 250, 0.3, 0.1, 2e9, perplexity=0.7),  # rounding has made it less sure of itself
    ]
    smallest, fastest, front = recommend(rows, 4 * 10**9)
    assert smallest.label == "Q8_0"
    assert fastest.label == "Q4_0"
    assert "4 GB" in fastest.rule
    assert front.label == "bad, Q4_0, Q6_K, Q8_0, F16"
    assert recommend(rows[:2], 10**9)[1].label is None


def test_without_divergences_the_fastest_keeps_the_tasks_scores() -> None:
    def scored(label: str, seconds: float, accuracy: float, chair: float) -> Row:
        plain = row(label, 1, 0.0, seconds, 1e9)
        metrics = {name: plain.metrics[name] for name in ("ttft_warm", "tg64@0", "peak_memory")}
        scores = {"easy-vqa accuracy": Metric("score", accuracy), "chair chair_i": Metric("score", chair)}
        return replace(plain, metrics={**metrics, **scores})

    rows = [scored("F16", 3.0, 0.8, 0.1), scored("Q8_0", 2.0, 0.79, 0.1), scored("Q4_0", 1.0, 0.79, 0.2)]
    rows.append(scored("Q2_K", 0.5, 0.5, 0.1))
    (fastest,) = recommend(rows, 4 * 10**9)
    assert fastest.label == "Q8_0"
    assert fastest.rule.endswith("easy-vqa accuracy and chair chair_i at most 5% worse than F16's")


def test_the_front_has_what_nothing_beats() -> None:
    points = {"a": (1, 5), "b": (2, 3), "c": (3, 4), "d": (4, 1), "e": (2, 6)}
    rows = [row(name, 1, 0, 1, 1) for name in points]
    front = pareto(rows, lambda r: points[r.label][0], lambda r: points[r.label][1])
    assert [r.label for r in front] == ["a", "b", "d"]


def test_two_results_are_compared_with_intervals(result: Result) -> None:
    rows = tuple(replace(r, metrics={"ttft_warm": Metric("s", 2.0, (1.8, 2.2))}) for r in result.rows)
    slow = tuple(replace(r, metrics={"ttft_warm": Metric("s", 4.0, (3.9, 4.1))}) for r in result.rows)
    first, second = replace(result, rows=rows), replace(result, rows=slow)
    found = compare(first, second).rows[0]
    assert found.ratio == 2
    assert found.differs is True
    assert found.interval is not None
    assert found.interval[0] < 2 < found.interval[1]
    assert compare(first, first).rows[0].differs is False
    assert compare(first, first).differences == ()
    single = replace(first, rows=(replace(rows[0], metrics={"ttft_warm": Metric("s", 4.0)}),))
    assert compare(first, single).rows[0].differs is None


@pytest.mark.parametrize(("count", "differs"), [(2, None), (5, None), (6, True)])
def test_few_samples_tell_no_difference(result: Result, count: int, differs: bool | None) -> None:
    """The range of two equal distributions' samples is apart every third time."""
    row = replace(result.rows[0], metrics={"load": of_samples("s", [1 + n / 100 for n in range(count)])})
    slow = replace(row, metrics={"load": of_samples("s", [2 + n / 100 for n in range(9)])})
    compared = compare(replace(result, rows=(row,)), replace(result, rows=(slow,)))
    assert compared.rows[0].differs is differs
    assert ("fewer than 6 samples" in markdown(compared)) == (differs is None)


def test_what_makes_results_incomparable_is_pointed_out(result: Result) -> None:
    machine = replace(result.machine, cpu="another one")
    files = (replace(result.rows[0].files[0], sha256="0" * 64), *result.rows[0].files[1:])
    other = replace(
        result,
        machine=machine,
        settings={**result.settings, "image_tokens": 16},
        rows=(replace(result.rows[0], files=files, vision_backend="native", image_size=64), *result.rows[1:]),
        onnxruntime_version="0.1",
    )
    differences = compare(result, other).differences
    assert f"machine.cpu: {result.machine.cpu} and another one" in differences
    assert "settings.image_tokens: 4 and 16" in differences
    assert "F16 / F16: the llm files are different ones" in differences
    assert "F16 / F16: vision backend: mtmd and native" in differences
    assert "F16 / F16: image size: 32 and 64" in differences
    assert f"onnxruntime_version: {result.onnxruntime_version} and 0.1" in differences
    with pytest.raises(InputError, match="nothing to compare"):
        compare(result, replace(result, rows=(replace(result.rows[0], label="x"), replace(result.rows[0], label="y"))))


def with_onnx(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle as if it had an ONNX tower, too."""
    onnx = BundleFile("vision-fp32.onnx", "vision_onnx", "0" * 64, 1, "fp32")
    fields = {"files": (*bundle.manifest.files, onnx), "backends": ("onnx", "mtmd"), **changes}
    return replace(bundle, manifest=replace(bundle.manifest, **fields))


def test_towers_are_those_that_the_backends_run_or_that_are_asked_for(f16_bundle: Path) -> None:
    plain = open_bundle(f16_bundle)
    both, only = with_onnx(plain), with_onnx(plain, backends=("onnx",))
    fp32, int8, q8 = Tower("vision_onnx", "fp32"), Tower("vision_onnx", "int8"), Tower("mmproj", "Q8_0")
    assert towers(QuantsSettings(), plain) == [q8]
    assert towers(QuantsSettings(), both) == [fp32, int8, q8]
    assert towers(QuantsSettings(), only) == [fp32, int8]
    assert towers(QuantsSettings(mmproj_types=("Q8_0",), vision_types=("INT8",)), both) == [int8, q8]
    assert reference_tower(plain.manifest) == Tower("mmproj", "F16")
    assert reference_tower(both.manifest) == fp32
    assert [v.name for v in variants(QuantsSettings(("Q4_0",), ("Q8_0",)), both)] == ["F16-fp32", "Q4_0-Q8_0"]
    with pytest.raises(InputError, match="runs with onnx: another mmproj would change nothing"):
        towers(QuantsSettings(mmproj_types=("Q8_0",)), only)
    with pytest.raises(InputError, match="runs with mtmd: another vision_onnx would change nothing"):
        towers(QuantsSettings(vision_types=("int8",)), plain)


def test_a_tower_that_llama_cpp_reads_wrongly_is_left_out(f16_bundle: Path) -> None:
    parity = {"mtmd": {"F16": {"right": False, "why": "positions are off by one"}}}
    plain = open_bundle(f16_bundle)
    clip = with_onnx(plain, parity=parity)
    alone = replace(plain, manifest=replace(plain.manifest, parity=parity))
    assert towers(QuantsSettings(), clip) == [Tower("vision_onnx", "fp32"), Tower("vision_onnx", "int8")]
    for bundle, settings in ((clip, QuantsSettings(mmproj_types=("F16",))), (alone, QuantsSettings())):
        with pytest.raises(InputError, match="can't be measured with its mmproj: positions are off by one"):
            towers(settings, bundle)


def test_variants_are_named_for_files() -> None:
    assert Variant("Q4_K_M", Tower("mmproj", "Q8_0")).name == "Q4_K_M-Q8_0"
    assert json.loads(json.dumps(SETTINGS.facts(None)))["types"] == ["Q8_0", "Q4_0"]
