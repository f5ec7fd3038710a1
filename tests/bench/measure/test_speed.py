from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llava_edge.bench import environment, statistics
from llava_edge.bench.environment import Watch
from llava_edge.bench.models import open_subject
from llava_edge.bench.record import Metric, Result, read_result, write_atomically
from llava_edge.bench.report import table
from llava_edge.bench.speed import cold, first_token
from llava_edge.bench.speed.ceilings import matrix_rate, read_bandwidth
from llava_edge.bench.speed.measure import SpeedSettings, bench_speed
from llava_edge.bench.speed.repeat import Limits, repeat
from llava_edge.bundle import open_bundle, sha256_file
from llava_edge.errors import InputError, LlavaEdgeError

QUICK = SpeedSettings(1, 16, 4, (0, 8, 5000), 1, limits=Limits(2, 2, 5))


@pytest.fixture(scope="module")
def result(tiny_bundle: Path) -> Result:
    return bench_speed([open_subject(tiny_bundle)], QUICK, lambda _line: None)


def test_every_figure_is_there_with_its_samples(result: Result) -> None:
    metrics = result.rows[0].metrics
    expected = {"ttft_cold", "peak_memory", "load", "encode", "pp16", "tg4@0", "tg4@8", "ttft_warm", "ttft_warm_p95"}
    assert expected <= set(metrics)
    assert {"encode_mfu", "pp16_mfu", "tg4@0_mbu", "tg4@8_mbu"} <= set(metrics)
    for name in ("encode", "pp16", "tg4@8", "ttft_warm"):
        metric = metrics[name]
        assert len(metric.samples) == 2
        assert metric.interval == (min(metric.samples), max(metric.samples))
        assert metric.value > 0
    assert metrics["ttft_warm_p95"].value == max(metrics["ttft_warm"].samples)
    assert metrics["peak_memory"].value > 30e6
    assert set(result.ceilings) == {"read_bandwidth", "matrix_rate F32"}


def test_the_record_tells_where_and_with_what(result: Result, tiny_bundle: Path) -> None:
    row = result.rows[0]
    assert [file.sha256 for file in row.files] == [
        sha256_file(tiny_bundle / file.path) for file in open_bundle(tiny_bundle).manifest.files
    ]
    assert (row.image_size, row.image_tokens, row.vision_backend) == (32, 4, "mtmd")
    assert row.files[0].tensors == {"F32": 20}
    assert result.settings["threads"] == 1
    assert "0c1e57" in result.llama_cpp_commit
    assert result.machine.cpu_flags.startswith("CPU")
    assert result.created_utc.endswith("Z")


def test_a_depth_beyond_the_context_is_left_out_and_said(result: Result) -> None:
    assert "tg4@5000" not in result.rows[0].metrics
    assert any("depth 5000 is left out" in warning for warning in result.warnings)


def test_the_context_has_room_for_every_tile_of_a_picture(tiny_bundle: Path) -> None:
    subject = open_subject(tiny_bundle)
    assert subject.picture_tokens == 4
    image = replace(subject.bundle.manifest.image, mode="anyres", grid=((64, 32), (32, 96)))
    tiled = replace(subject.bundle, manifest=replace(subject.bundle.manifest, image=image))
    # 2 x 2 cells a tile: the whole, and three tiles on top of each other with an end after each of their six rows
    assert replace(subject, bundle=tiled).picture_tokens == 4 + 6 * (2 + 1)


def test_a_start_that_fails_says_why_in_a_line(tiny_bundle: Path, tmp_path: Path) -> None:
    subject, picture = open_subject(tiny_bundle), tmp_path / "picture.png"
    picture.write_text("no picture")
    with pytest.raises(LlavaEdgeError, match=r"process of its own: .*picture\.png is not a picture") as caught:
        cold.start(subject, picture, threads=1, n_ctx=256)
    assert len(str(caught.value).splitlines()) == 1
    asked = {"bundle": str(tiny_bundle), "counts": [4], "settings": {"n_threads": 1}, "questions": ["a", "b"]}
    with pytest.raises(LlavaEdgeError, match=r"process of its own: .*picture\.png is not a picture") as caught:
        first_token.run("again", picture=str(picture), **asked)
    assert len(str(caught.value).splitlines()) == 1


def test_in_passes_every_pass_is_a_sample(tiny_bundle: Path, tmp_path: Path) -> None:
    said: list[str] = []
    settings = replace(QUICK, depths=(0,), cold_starts=3, passes=2)
    subjects = [open_subject(tiny_bundle), replace(open_subject(tiny_bundle), label="again")]
    result = bench_speed(subjects, settings, said.append, tmp_path / "kept.json")
    assert [row.label for row in result.rows] == [subject.label for subject in subjects]
    for row in result.rows:
        assert all(len(metric.samples) == 2 for name, metric in row.metrics.items() if name != "ttft_warm_p95")
        assert row.metrics["ttft_warm_p95"].value == max(row.metrics["ttft_warm"].samples)
        assert not any("repetitions" in note for note in row.notes)
    first = subjects[0].label
    order = [line for line in said if line.endswith(": pp16")]
    assert order == [f"{first}: pp16", "again: pp16"] * 2
    assert sum(": cold start" in line for line in said) == 3 * len(subjects)
    assert sum(": first start" in line for line in said) == len(subjects)
    assert {len(metric.samples) for metric in result.ceilings.values()} == {2}
    assert read_result(tmp_path / "kept.json").rows == result.rows


def test_rows_are_written_before_a_later_bundle_fails(tiny_bundle: Path, tmp_path: Path) -> None:
    good = open_subject(tiny_bundle)
    bad = replace(good, label="bad", vision_backend="onnx")
    settings = replace(QUICK, cold_starts=0, depths=(0,))
    with pytest.raises(LlavaEdgeError, match="vision backend onnx"):
        bench_speed([good, bad], settings, lambda _line: None, tmp_path / "speed.json")
    assert [row.label for row in read_result(tmp_path / "speed.json").rows] == [good.label]


def test_a_record_survives_its_file(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, result.to_json())
    assert read_result(path) == result
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.pop("machine"), "missing key machine"),
        (lambda r: r.update(more=1), "unknown key more"),
        (lambda r: r.update(schema=2), "schema is 2"),
        (lambda r: r["rows"][0]["metrics"]["encode"].update(value="fast"), "metrics.encode.value is 'fast'"),
        (lambda r: r["rows"][0]["files"][0].update(bytes="1"), r"files\[0\].bytes"),
    ],
)
def test_a_wrong_record_is_refused_by_key(
    result: Result, tmp_path: Path, change: Callable[[dict[str, object]], object], says: str
) -> None:
    record = json.loads(result.to_json())
    change(record)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=f"not a result.*{says}"):
        read_result(path)


def test_work_is_counted_from_the_files(tiny_bundle: Path) -> None:
    weights = open_subject(tiny_bundle).weights
    llm, tower = weights["llm"], weights["mmproj"]
    # 2 layers of width 64: q and o 64 x 64, k and v 32 x 64, three matrices of 96 x 64
    assert llm.prefill_flops() == {"F32": 2 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)}
    assert llm.decode_bytes(0) == sum(t.bytes for t in llm.tensors)
    # keys and values of 2 heads of 16 in 2 layers, float16
    assert llm.decode_bytes(10) - llm.decode_bytes(0) == 10 * 2 * 2 * 2 * 16 * 2
    # 16 patches; patches of 3 x 8 x 8 to 32, 2 blocks of 4 x 32 x 32 and 2 x 64 x 32, projector 64 to 48 to 64
    once = 3 * 8 * 8 * 32 + 2 * (4 * 32 * 32 + 2 * 64 * 32) + 64 * 48 + 48 * 64
    assert tower.encode_flops() == {"F32": 2 * 16 * once}


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K", "IQ4_NL"])
def test_the_ceilings_are_measured(kind: str) -> None:
    metric = matrix_rate(kind, 1)
    assert metric.value == max(metric.samples) > 0


def test_the_bandwidth_is_the_best_round() -> None:
    metric = read_bandwidth(2, size=1 << 22)
    assert metric.value == max(metric.samples) > 0


def test_the_interval_of_a_median_comes_from_order_statistics() -> None:
    assert statistics.median_interval([3.0]) is None
    assert statistics.median_interval([3, 1, 2]) == (1, 3)
    assert statistics.median_interval([6, 5, 4, 3, 2, 1]) == (1, 6)
    # the table of exact binomial intervals: 2nd and 8th of 9, 6th and 15th of 20
    assert statistics.median_interval(range(1, 10)) == (2, 8)
    assert statistics.median_interval(range(1, 21)) == (6, 15)


def test_repetitions_end_when_they_agree_or_when_a_limit_is_met() -> None:
    calm = repeat(lambda: 1.0, Limits(6, 30, 100))
    assert calm.samples == [1.0] * 6
    assert calm.doubt is None
    values = iter([0.0, *[1.0, 2.0] * 5])
    wild = repeat(lambda: next(values), Limits(6, 10, 100))
    assert len(wild.samples) == 10
    assert wild.doubt is not None
    assert "after 10 repetitions" in wild.doubt
    with pytest.raises(InputError, match="5 to 3"):
        Limits(5, 3)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="this system doesn't tell what other programs use")
def test_other_programs_are_noticed_and_own_work_is_not() -> None:
    watch = Watch()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(0.5)
        found = watch.others()
        other.kill()
    assert found is not None
    assert found > 0.05


def test_cells_are_rounded_at_the_edge_only(result: Result) -> None:
    row = replace(result.rows[0], label="x", metrics={"kl_mean": Metric("nats", 0.0123456, (0.01, 0.02))})
    lines = table.markdown(replace(result, rows=(row,))).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "model", "size MB", "pictures read by", "KL mean",
    ]  # fmt: skip
    assert "0.0123 ±0.0050" in lines[2]
    assert "0.0123456" in table.as_csv(replace(result, rows=(row,)))


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS tells it by a command")
@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({}, "unknown"),
        ({"AC": {"type": "Mains", "online": "1"}, "BAT0": {"type": "Battery", "status": "Full"}}, "mains"),
        ({"BAT0": {"type": "Battery", "status": "Charging"}}, "mains"),
        ({"AC": {"type": "Mains", "online": "0"}, "BAT0": {"type": "Battery", "status": "Discharging"}}, "battery"),
    ],
)
def test_the_power_source_is_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supplies: dict[str, dict[str, str]], expected: str
) -> None:
    for name, facts in supplies.items():
        (tmp_path / name).mkdir()
        for key, value in facts.items():
            (tmp_path / name / key).write_text(f"{value}\n")
    monkeypatch.setattr(environment, "_POWER", tmp_path)
    assert environment.power_source() == expected


def test_energy_is_the_sum_of_the_packages_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_RAPL", tmp_path)
    assert environment.energy_joules() is None
    zones = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core", "intel-rapl:2": "psys"}
    for zone, name in zones.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "energy_uj").write_text("2500000\n")
    assert environment.energy_joules() == 5.0
