"""Reports and tables of results: well-formed, self-contained, complete, and readable on every screen."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from support import latency_samples as samples
from support.paths import ROOT
from support.schema_digest import schema_digest

from fusion_edge.benchmarks.latency.report import labels, table
from fusion_edge.benchmarks.latency.report.charts import Axis, Markup, element
from fusion_edge.benchmarks.latency.report.page import html_report
from fusion_edge.benchmarks.latency.result import SCHEMA, BenchResult, Case, read_result
from fusion_edge.benchmarks.latency.statistics import summarize
from fusion_edge.runtime.stages import DECODE_STEP

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome-headless-shell")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
HOSTILE = '<script src="//x">&"\''
VOID = {"meta", "link"}


class Page(HTMLParser):
    """Parsed page; fails for an element that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


RESULTS = {
    "one case": samples.result(),
    "a dozen": samples.matrix(),
    "a GPU": samples.on_gpu(),
    "no image": samples.of_few_stages(),
    "equal times": samples.result([samples.case_result(samples.case(), noise=0.0, steps=7)]),
    "a soak": samples.result([samples.case_result(samples.case(), steps=20_000)]),
}


@pytest.fixture(params=RESULTS.values(), ids=list(RESULTS))
def result(request: pytest.FixtureRequest) -> BenchResult:
    assert isinstance(request.param, BenchResult)
    return request.param


def test_report_is_self_contained(result: BenchResult) -> None:
    text = html_report(result)
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert not {"script", "img", "iframe", "object", "base"} & {name for name, _ in page.elements}
    references = [v for _, attrs in page.elements for k, v in attrs.items() if k in ("href", "src", "data", "srcset")]
    targets = {f"#{attrs['id']}" for _, attrs in page.elements if "id" in attrs}
    assert {*references} <= {"data:,", *targets}
    assert len(text) < 500_000  # for a soak of any length


def test_report_has_every_case_and_fact(result: BenchResult) -> None:
    page = Page(html_report(result))
    cases = [measured.case for measured in result.cases]
    options = labels.differing_options(cases)
    for measured in result.cases:
        assert labels.case_name(measured.case, options) in page.text
        for name, summary in labels.measures(measured).items():
            assert name in page.texts
            assert labels.duration(summary.p99) in page.texts
    assert page.count("details") == (len(cases) if len(cases) > 1 else 0)
    machine, bundle = result.machine, result.bundle
    facts = (machine.processor, machine.system, machine.gpu, machine.power_mode, bundle.digest, bundle.source)
    for text in (*facts, *machine.versions.values(), result.command):
        assert text is None or text in page.texts
    assert ("too noisy" in page.text) == any(measured.is_noisy for measured in result.cases)
    assert ("Throttled: " in page.text) == (machine.throttled is not None)


def test_charts_of_a_case() -> None:
    page = Page(html_report(samples.result()))
    (measured,) = samples.result().cases
    kinds = [attrs.get("class") for name, attrs in page.elements if name == "rect"]
    assert [kind for kind in kinds if kind == "segment orange"] == ["segment orange"] * 2  # prefill, in both questions
    assert [kind for kind in kinds if kind == "segment sky"] == ["segment sky"]  # global crops, in the first only
    titles = [
        "Time to first token",
        "Decode steps over time",
        "Distribution of decode steps",
        "Memory of the process",
    ]
    assert [text for text in page.texts if text in titles] == titles[:1] + titles
    step = measured.roofline.decode
    assert step.roofline_seconds is not None
    assert f"roofline {labels.duration(step.roofline_seconds)}" in page.texts
    assert f"{step.share:.0%}" in page.texts
    assert "Decode step over context" not in page.texts
    assert "Decode step over context" in Page(html_report(samples.matrix())).texts


def test_steps_outside_a_plot_are_reported() -> None:
    one = samples.case_result(samples.case())
    values = (*one.stages[DECODE_STEP].values, 1.5)
    slow = replace(one, stages={**one.stages, DECODE_STEP: summarize(values)})
    text = Page(html_report(samples.result([slow]))).text
    assert "Above the plot: 1 of 401 steps, the slowest 1.50 s." in text


def test_missing_roofline_has_a_reason() -> None:
    result = samples.on_gpu()
    page = Page(html_report(result))
    assert "not measured" in page.texts
    assert "Memory of the GPU" in page.texts
    assert "Prefill needs 3.33 TMAC (multiply-adds). An engine would be needed." in page.texts
    assert not [text for text in page.texts if text.startswith("prefill at the roofline")]
    text = table.text(result)
    assert "roofline of tensorrt: 668 GB/s memory bandwidth, compute not measured (An engine would be needed.)" in text
    assert "GPU memory, peak" in text
    assert "prefill roofline" not in text


def test_remark_is_shown() -> None:
    result = samples.result([replace(samples.case_result(samples.case()), remark="Kernels are missing.")])
    assert "cpu: Kernels are missing." in Page(html_report(result)).texts
    assert "cpu: Kernels are missing.\n" in table.text(result)


def test_names_are_escaped() -> None:
    result = samples.result([samples.case_result(samples.case(device=HOSTILE))] * 2, source=HOSTILE, processor=HOSTILE)
    page = Page(html_report(replace(result, command=HOSTILE)))
    assert page.count("script") == 0
    assert page.texts.count(HOSTILE) >= 3
    assert element("p", HOSTILE, Markup("<b>"), title='"') == (
        '<p title="&quot;">&lt;script src="//x"&gt;&amp;"\'<b></p>'
    )


def test_axis_has_round_ticks() -> None:
    assert Axis(0, 86, "{:.0f}".format).ticks(5) == [(0, "0"), (20, "20"), (40, "40"), (60, "60"), (80, "80")]
    assert [text for _, text in Axis(69.2, 75.4, "{:.0f}".format).ticks(4)] == ["70", "72", "74"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1234.0, "1,234 s"),
        (99.96, "100 s"),
        (16.46, "16.5 s"),
        (0.9996, "1.00 s"),
        (0.0612, "61.2 ms"),
        (2.1e-4, "210 µs"),
        (0, "0 ns"),
    ],
)
def test_durations_have_three_digits(seconds: float, text: str) -> None:
    assert labels.duration(seconds) == text


def test_few_values_have_no_error() -> None:
    assert labels.error(summarize([1.0] * 6)) == "±?"
    assert labels.error(summarize([1.0] * 12, rounds=6)) == "±?"
    assert labels.error(summarize([0.98, 1.0, 1.0, 1.0, 1.0, 1.0, 1.02])) == "±2.0%"
    assert "±?: Too few rounds for a confidence interval; 7 are needed." in table.text(samples.of_few_stages())
    assert "±?" not in table.text(samples.result())


def test_cases_are_named_by_every_option() -> None:
    case = samples.case()
    assert labels.case_name(case) == (
        "cpu, threads 2, query length 144, image tokens 576, prompt 900, new tokens 128, context 1,000"
    )
    assert labels.common_options([case]) == [field.name for field in fields(Case)]
    assert labels.differing_options([case, samples.case(context=7)]) == ["context"]


@pytest.mark.parametrize("width", [40, 100, 300])
def test_table_fits_the_terminal(result: BenchResult, width: int) -> None:
    text = table.text(result, width)
    tables = text.split("\n\n", 1)[1].split("±?:")[0].split("machine too noisy")[0]
    assert max(map(len, tables.splitlines())) <= (width if len(result.cases) > 1 else 100)
    for measured in result.cases:
        for name, one in labels.measures(measured).items():
            if len(result.cases) == 1:
                times = [labels.duration(value) for value in (one.p50, one.min, one.p95, one.p99, one.max)]
                row = f"{name} {times[0]} {labels.error(one)} {' '.join(times[1:])} {one.count:,}"
                assert row in [" ".join(line.split()) for line in tables.splitlines()]
            else:
                assert f"{labels.duration(one.p50)} {labels.error(one):>6}" in text
        step = measured.roofline.decode
        assert step.roofline_seconds is not None
        assert f"{labels.duration(step.roofline_seconds)} ({step.share:.0%})" in text
    assert text.count("  too noisy") == sum(measured.is_noisy for measured in result.cases)
    assert ("machine too noisy:" in text) == any(measured.is_noisy for measured in result.cases)


def test_csv_has_a_row_for_each_case_and_stage(result: BenchResult) -> None:
    rows = list(csv.DictReader(io.StringIO(table.csv(result))))
    wanted = [(one, name) for one in result.cases for name in labels.measures(one)]
    assert len(rows) == len(wanted)
    for row, (measured, name) in zip(rows, wanted, strict=True):
        summary = labels.measures(measured)[name]
        assert (row["stage"], row["context"]) == (name, str(measured.case.context))
        assert float(row["p50"]) == summary.p50
        assert row["ci95_high"] == ("" if summary.ci95 is None else str(summary.ci95[1]))
        assert row["is_noisy"] == str(measured.is_noisy)
        assert row["memory_peak"] == str(measured.memory.peak)
        assert row["device_memory_peak"] == ("" if measured.device_memory is None else str(measured.device_memory.peak))


def test_result_survives_its_file(result: BenchResult, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(result.to_json(), encoding="utf-8")
    assert html_report(read_result(path)) == html_report(result)


def test_a_changed_schema_has_a_new_version() -> None:
    """A changed field needs a new version in result.py and docs/fusion-bench.md, and the new digest here."""
    assert (SCHEMA.version, schema_digest(BenchResult)) == (4, "76fd8f15bb679d15")
    text = (ROOT / "docs" / "fusion-bench.md").read_text(encoding="utf-8")
    assert f"`schema_version` is {SCHEMA.version}." in text


@pytest.fixture(params=[360, 1200], ids=["phone", "desktop"])
def width(request: pytest.FixtureRequest) -> int:
    assert isinstance(request.param, int)
    return request.param


def browse(page: Path, text: str, width: int, *options: str) -> str:
    """Return the browser's output about a page in a frame ``width`` pixels wide, because windows are at least 500 wide.

    A message of the page becomes the title.
    """
    if BROWSER is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")
    page.write_text(text, encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(
        "<!DOCTYPE html><title></title><script>onmessage = event => document.title = event.data</script>"
        f'<body style="margin:0"><iframe src="{page.name}" style="border:0;width:{width}px;height:2400px"></iframe>',
        encoding="utf-8",
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--virtual-time-budget=2000"]  # time for the message
    command += [f"--window-size={width},2400", f"--user-data-dir={page.parent / 'user'}", *options, frame.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, timeout=60, text=True).stdout


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_screenshot(width: int, is_dark: bool, tmp_path: Path) -> None:
    picture = tmp_path / "report.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    browse(tmp_path / "report.html", html_report(samples.result()), width, scheme, f"--screenshot={picture}")
    with Image.open(picture) as image:
        framed = image.convert("RGB").crop((0, 0, width, image.height))
        colors = {color: count for count, color in framed.getcolors(1 << 20) or ()}
    page, card = ((16, 20, 27), (25, 31, 41)) if is_dark else ((245, 246, 248), (255, 255, 255))
    assert sorted(colors, key=lambda color: -colors[color])[:2] in ([page, card], [card, page])
    prefill = 0xE6, 0x9F, 0x00
    assert colors[prefill] > width  # its bar is visible


@pytest.mark.parametrize("name", RESULTS)
def test_page_is_no_wider_than_the_screen(name: str, width: int, tmp_path: Path) -> None:
    measure = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    text = html_report(RESULTS[name]).replace("<details>", "<details open>").replace("</body>", f"{measure}</body>")
    text = text.replace("default-src 'none'".replace("'", "&#x27;"), "script-src &#x27;unsafe-inline&#x27;")
    assert f"<title>{width}</title>" in browse(tmp_path / "report.html", text, width, "--dump-dom")
