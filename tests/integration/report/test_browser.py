"""The report's page in a real browser: every figure is drawn, and the slider moves the heat map."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.report.page import write_report
from tests.browser import CHROMIUM, Page, browser
from tests.report_runs import EVERY, EXPERTS, STEPS, load_at, write_run, write_scores

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install chromium, or put one on PATH"
)

FIGURES = (
    *("loss", "load", "entropy", "experts", "routers", "scores", "rate", "speed", "mapping"),
)
EVIL = "e8t2</script><b id=evil>&\"'"

LOADS = "[...document.querySelectorAll('#load .cell')].map(cell => Number(cell.dataset.load))"
COLORS = "[...document.querySelectorAll('#load .cell')].map(cell => getComputedStyle(cell).fill)"
MOVE = """(to => {
  const slider = document.querySelector('#load input');
  slider.value = to;
  slider.dispatchEvent(new Event('input'));
})"""
# Of every mark of a figure whether it has a place inside the figure and a color.
MARKS = """[...document.querySelectorAll(`#${figure} .mark`)].map(mark => {
  const box = mark.getBoundingClientRect();
  const around = document.getElementById(figure).getBoundingClientRect();
  const style = getComputedStyle(mark);
  const drawn = style.fill !== 'none' || style.stroke !== 'none';
  const inside = box.left >= around.left - 1 && box.right <= around.right + 1
    && box.top >= around.top && box.bottom <= around.bottom;
  return drawn && inside && (box.width > 1 || box.height > 1);
})"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a whole run, whose names try to break out of it."""
    home = tmp_path_factory.mktemp("runs")
    run = write_run(home / EVIL.replace("/", ""), f"models/{EVIL}")
    dense = write_run(home / "dense", experts=None)
    write_scores(run / "evaluation", f"demo/{run.name}/last")
    return write_report(run, dense, out=home / "page.html").path


def opened(chromium: Page, path: Path, width: int, scheme: str = "light", at: str = "") -> Page:
    chromium.complaints.clear()
    chromium.requests.clear()
    chromium.open(path.as_uri() + at, width, scheme=scheme)
    return chromium


def of_figure(page: Page, script: str, figure: str) -> Any:
    return page.run(f"(figure => {script})({json.dumps(figure)})")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_figure_is_drawn(chromium: Page, report: Path, width: int, scheme: str) -> None:
    page = opened(chromium, report, width, scheme)
    for figure in FIGURES:
        marks = of_figure(page, MARKS, figure)
        assert marks, figure
        assert all(marks), (figure, marks)
        texts = of_figure(
            page,
            "[...document.querySelectorAll(`#${figure} svg text`)].map(t => t.textContent)",
            figure,
        )
        assert not [text for text in texts if "NaN" in text or "undefined" in text], texts
        for part in ("svg[role=img][aria-label]", "svg .label", "h2", "figcaption", "table"):
            assert of_figure(page, f"!!document.querySelector(`#${{figure}} {part}`)", figure), part
    # Nothing is wider than the window, tables of numbers included.
    page.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run("document.querySelectorAll('[data-drawn]').length") == len(FIGURES)
    assert page.complaints == []
    assert {*page.requests} == {report.as_uri()}


def test_names_do_not_run(chromium: Page, report: Path) -> None:
    page = opened(chromium, report, 1280)
    assert page.run("document.getElementById('evil')") is None
    assert page.run("document.querySelector('h1').textContent") == EVIL.replace("/", "")
    assert EVIL in page.run("document.querySelector('.headline').textContent")
    assert page.run("document.querySelector('#loss .legend').textContent").count("evil") == 2


def test_the_slider_changes_the_heat_map(chromium: Page, report: Path) -> None:
    page = opened(chromium, report, 390)
    last, colors = page.run(LOADS), page.run(COLORS)
    page.run(f"{MOVE}(0)")
    assert page.run(LOADS) != last
    assert page.run(COLORS) != colors
    for index, step in enumerate(range(1, STEPS, EVERY)):
        page.run(f"{MOVE}({index})")
        expected = [100 * load for loads in load_at(step).relative.values() for load in loads]
        assert page.run(LOADS) == pytest.approx(expected, abs=0.6)
        assert f"step {step} ·" in page.run("document.querySelector('#load output').textContent")
    assert (page.run(LOADS), page.run(COLORS)) == (last, colors)
    assert page.complaints == []


def test_a_link_opens_at_a_step(chromium: Page, report: Path) -> None:
    page = opened(chromium, report, 390, at="#step=41")
    assert "step 41 ·" in page.run("document.querySelector('#load output').textContent")
    page = opened(chromium, report, 390, at="#step=none")
    assert "step 91 ·" in page.run("document.querySelector('#load output').textContent")


def test_values_at_the_pointer(chromium: Page, report: Path) -> None:
    page = opened(chromium, report, 1280)
    for selector, said in (
        ("#load .cell", "layer 1, expert 0: 1."),
        ("#mapping .cell", "rank 0 (attention and dense layers): TP 0, CP 0, DP 0, PP 0"),
        ("#loss svg[role=img]", "dense, training 4.1"),
    ):
        place = page.run(
            f"(() => {{ const node = document.querySelector('{selector}');"
            "node.scrollIntoView({ block: 'center', behavior: 'instant' });"
            "const box = node.getBoundingClientRect();"
            "return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
        figure = selector.split()[0]
        assert said in page.run(f"document.querySelector('{figure} .readout').textContent")


def test_the_window_may_change(chromium: Page, report: Path) -> None:
    page = opened(chromium, report, 1280)
    size = {"height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.call("Emulation.setDeviceMetricsOverride", width=500, **size)
    frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    while page.run("document.querySelector('#loss svg[role=img]').viewBox.baseVal.width") > 500:
        page.run(frames)
    assert page.run("document.documentElement.scrollWidth") == 500
    assert all(all(of_figure(page, MARKS, figure)) for figure in FIGURES)
    assert page.complaints == []


def test_many_layers_experts_and_ranks(chromium: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path / "big", experts=64, layers=32, world_size=512)
    report = write_report(run).path
    for width in (390, 1280):
        page = opened(chromium, report, width)
        assert len(of_figure(page, MARKS, "load")) == 31 * 64
        assert all(of_figure(page, MARKS, "load"))
        assert page.run("document.documentElement.scrollWidth") == width
        assert page.complaints == []


def test_a_run_with_little(chromium: Page, tmp_path: Path) -> None:
    """One point per curve, one rank, two experts in one layer, losses that do not change."""
    scalars = {
        "reduced_train_loss": {0: 2.0},
        "val_loss": {},
        "lr": {0: 0.0},
        "mfu": {1: 0.5},
        "global_batch_size": {0: 1.0},
        "moe/router_entropy": {1: 0.5},
    }
    mapping = {"world_size": 1, "ranks_per_node": 1}
    run = write_run(
        tmp_path / "little",
        experts=2,
        layers=2,
        record={"mapping": mapping, "upcycling": {"num_moe_experts": 2, "moe_router_topk": 2}},
        scalars=scalars,
    )
    page = opened(chromium, write_report(run).path, 390)
    assert len(of_figure(page, MARKS, "load")) == EXPERTS // 4
    assert all(of_figure(page, MARKS, "mapping"))
    assert of_figure(page, MARKS, "loss")
    assert "NaN" not in page.run(
        "document.body.innerText + document.querySelector('main').innerHTML"
    )
    assert page.complaints == []


def test_a_run_without_data_draws_nothing_and_says_so(chromium: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record={"mapping": None})
    for path in (*(run / "logs").iterdir(), *(run / "health").iterdir()):
        path.unlink()
    page = opened(chromium, write_report(run).path, 390)
    assert page.run("document.querySelectorAll('.mark').length") == 0
    assert page.run("document.querySelectorAll('figure .missing').length") == len(FIGURES)
    assert page.complaints == []
