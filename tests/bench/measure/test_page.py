"""The report in a real browser, at the width of a desk and of a phone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_edge.bench.environment import result as new_result
from llava_edge.bench.record import Metric, ModelFile, Recommendation, Result, Row
from llava_edge.bench.report.html import page

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no browser here")]


def make_result() -> Result:
    mix = {"Q5_0": 167, "Q4_K": 16, "Q8_0": 14, "Q6_K": 14}
    rows = []
    for number, kind in enumerate(("F16", "Q8_0", "Q4_K_M", "Q2_K")):
        metrics = {
            name: Metric(unit, value, (value * 0.9, value * 1.1))
            for name, unit, value in (
                ("kl_mean", "nats", number / 100),
                ("kl_p99", "nats", number / 10),
                ("top1_agreement", "share", 0.9),
                ("perplexity_ratio", "ratio", 1 + number / 50),
                ("cider_d", "CIDEr-D", 0.5 - number / 50),
                ("ttft_warm", "s", 0.3 - number / 50),
                ("pp512", "tokens/s", 812.3),
                ("tg64@0", "tokens/s", 151.2),
            )
        }
        file = ModelFile("llm", f"llm-{kind}.gguf", kind, 10**8 * (5 - number), "0" * 64, mix)
        rows.append(Row(f"{kind} / Q8_0", "nano", "llava", 224, 64, (file,), metrics))
    made = new_result("quants", tuple(rows), {"threads": 2, "data_sha256": "0123456789abcdef" * 4})
    return replace(made, recommendations=(Recommendation("smallest within 1 % of F16", "Q8_0 / Q8_0"),))


@pytest.fixture(scope="module")
def browser() -> Any:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield started
        started.close()


@pytest.mark.parametrize(("width", "phone"), [(1280, False), (390, True)])
def test_the_page_reads_well_offline(browser: Any, tmp_path: Path, width: int, phone: bool) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(make_result(), "What quantisation costs"), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True)
    opened, problems = context.new_page(), []
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("requestfailed", lambda request: problems.append(request.url))
    opened.goto(path.as_uri())
    assert problems == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.locator("tr.picked").count() == 1
    assert opened.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert opened.locator("img").count() == 2
    assert opened.locator("thead").is_visible() is not phone
    cell = opened.locator("tbody tr").first.locator("td").nth(2)
    title = cell.evaluate("cell => getComputedStyle(cell, '::before').content")
    assert title == ('"KL mean"' if phone else "none")
    smallest = opened.evaluate(
        "Math.min(...[...document.querySelectorAll('td')].map(c => parseFloat(getComputedStyle(c).fontSize)))"
    )
    assert smallest >= 13
    picture = opened.screenshot(full_page=True)
    assert len(picture) > 20_000
    context.close()
