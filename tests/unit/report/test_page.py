"""The report's page: what goes into it, and that names cannot break out of it."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from nemo_upcycle.checkpoint.beside import UPCYCLED_FROM
from nemo_upcycle.cli import app
from nemo_upcycle.engine.load_record import LOADS, LoadRecord, read_loads
from nemo_upcycle.report.experts import CELLS, SNAPSHOTS
from nemo_upcycle.report.figures import POINTS
from tests.report_runs import EVERY, EXPERTS, SETTINGS, STEPS, load_at, write_run, write_scores

FIGURES = (
    *("loss", "load", "entropy", "experts", "routers", "scores", "rate", "speed", "mapping"),
)
EVIL = "</script><b>&\"'`{{ 7 }}<img src=x onerror=alert(1)>"


class Parsed(HTMLParser):
    """A page taken apart: tags, texts, and the data of its script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.data: dict[str, Any] = {}
        self._of_script: str | None = None
        self.feed(page)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")
        ]
        self._of_script = (given.get("id") or tag) if tag in ("script", "style") else None

    def handle_data(self, data: str) -> None:
        if self._of_script == "data":
            self.data = json.loads(data)
        elif self._of_script is None:
            self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._of_script = None


def report(*words: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["report", *map(str, words)])


def written(run: Path, *words: str | Path) -> Parsed:
    result = report(run, *words)
    assert result.exit_code == 0, result.output
    return Parsed((run / "report.html").read_text())


def refused(*words: str | Path) -> str:
    result = report(*words)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# --- What is in the page --------------------------------------------------------------------------


def test_a_whole_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "e8t2")
    dense = write_run(tmp_path / "dense", experts=None)
    write_scores(tmp_path / "evaluation", "demo/e8t2/checkpoints/last")
    page = written(run, "--dense", dense)
    assert tuple(page.data) == FIGURES
    assert "No data" not in page.text
    assert page.tags.count("figure") == len(FIGURES)
    for said in (
        "E8T2, upcycled from models/dense",
        "Step 0: exact",
        "Experts are the dense layer and their weights sum to 1. The run reported this",
        "First training loss, at step 0: 4.600000 here, 4.600000 in dense (no difference).",
        "2771b1d9" * 8,
        "0.7 × data/documentation (fingerprint d6ee)",
        "410 k",
        "TP2 CP1 PP1 · ETP1 EP4: 8 ranks, 8 per node",
        "2 × ETP·EP",
        "0.2650 ± 0.0310",
        "12.5000",  # a perplexity, in the table alone
    ):
        assert said in page.text
    assert [row["label"] for row in page.data["scores"]["rows"]] == ["next_line, acc"]


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "run"))
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    html = (tmp_path / "run" / "report.html").read_text()
    names_of_formats = {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[^\"'\s]+", html)) <= names_of_formats
    assert "default-src 'none'" in html


def test_curves_are_over_tokens(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "run"))
    training, _, validation = page.data["loss"]["series"]
    assert [x for x, _ in training["points"]] == [256 * 16 * (step + 1) for step in range(STEPS)]
    assert training["points"][0][1] == pytest.approx(4.6)
    assert [x for x, _ in validation["points"]] == [256 * 16 * 50, 256 * 16 * 100]
    # The experts are measured after the step, the loss before.
    assert page.data["entropy"]["series"][0]["points"][0][0] == 256 * 16
    assert page.data["entropy"]["reference"]["y"] == pytest.approx(math.log(EXPERTS), abs=1e-4)
    assert [each["layer"] for each in page.data["entropy"]["layers"]] == [1, 2, 3]


def test_a_run_with_a_bias_per_expert_and_a_warm_up_of_routers(tmp_path: Path) -> None:
    biased = {step: 1e-3 * step for step in range(1, STEPS, EVERY)}
    scalars = {f"moe/expert_bias_range{end}": biased for end in ("", "_layer_1", "_layer_3")}
    settings = SETTINGS | {"router_warmup_steps": 30}
    run = write_run(tmp_path / "run", scalars=scalars, record={"settings": settings})
    page = written(run)
    with_data = [name for name in FIGURES if name != "scores"]
    with_data.insert(with_data.index("experts"), "bias")
    assert list(page.data) == with_data
    expected = [[256 * 16 * step, pytest.approx(value)] for step, value in biased.items()]
    assert page.data["bias"]["series"][0]["points"] == expected
    assert [each["layer"] for each in page.data["bias"]["layers"]] == [1, 3]
    assert "router warm-up 30 steps" in page.text
    assert "router warm-up" not in written(write_run(tmp_path / "without")).text


def test_a_batch_size_that_grows(tmp_path: Path) -> None:
    sizes = {step: 16.0 if step < 50 else 32.0 for step in range(STEPS)}
    page = written(write_run(tmp_path / "run", scalars={"global_batch_size": sizes}))
    places = [x for x, _ in page.data["rate"]["series"][0]["points"]]
    assert places[49] == 256 * 16 * 50
    assert places[99] == 256 * (16 * 50 + 32 * 50)


def test_steps_where_tokens_are_unknown(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "run", record={"settings": {}}))
    assert page.data["loss"]["x"] == "training steps"
    assert page.data["load"]["at"][0] == {"step": 1, "tokens": None}


def test_the_heat_map_is_what_was_recorded(tmp_path: Path) -> None:
    chart = written(write_run(tmp_path / "run")).data["load"]
    steps = list(range(1, STEPS, EVERY))
    assert [each["step"] for each in chart["at"]] == steps
    assert (chart["layers"], chart["experts"]) == ([1, 2, 3], EXPERTS)
    for step, values in zip(steps, chart["values"], strict=True):
        for layer, shares in zip(chart["layers"], values, strict=True):
            expected = [100 * load for load in load_at(step).relative[layer]]
            assert shares == pytest.approx(expected, abs=0.6)  # hundredths


def test_long_runs_stay_small(tmp_path: Path) -> None:
    losses = {step: 4.0 - step / 10_000 for step in range(5_000)}
    run = write_run(tmp_path / "run", scalars={"reduced_train_loss": losses})
    record = LoadRecord(run / LOADS)
    record.begin(0)
    for step in range(1, 1_000):
        record.add(load_at(step, layers=9, experts=64))
    page = written(run)
    curve = page.data["loss"]["series"][0]["points"]
    assert len(curve) <= POINTS + 1
    assert curve[0] == [256 * 16, 4.0]  # step 0 is no mean
    at = page.data["load"]["at"]
    assert len(at) <= min(SNAPSHOTS, CELLS // (8 * 64))
    assert (at[0]["step"], at[-1]["step"]) == (1, 999)


def test_losses_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    losses = {0: 4.0, 1: math.nan, 2: math.inf, 3: 3.5}
    page = written(write_run(tmp_path / "run", scalars={"reduced_train_loss": losses}))
    assert [y for _, y in page.data["loss"]["series"][1]["points"]][:2] == [4.0, 3.5]
    broken = {name: dict.fromkeys((0, 1), math.nan) for name in ("reduced_train_loss", "lr", "mfu")}
    of_layer = {"moe/router_entropy_layer_1": {1: math.nan}}
    page = written(write_run(tmp_path / "broken", scalars=broken | of_layer))
    assert "Every logged loss is NaN or infinite." in page.text
    assert not page.data.keys() & {"loss", "rate", "speed"}
    assert [each["layer"] for each in page.data["entropy"]["layers"]] == [2, 3]


def test_what_a_run_lacks_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record={"step0": None, "mapping": None})
    for path in (*(run / "logs").iterdir(), run / LOADS):
        path.unlink()
    result = report(run)
    page = Parsed((run / "report.html").read_text())
    assert page.data == {}
    assert page.text.count("No data.") == len(FIGURES)
    assert "MoEHealthCallback, which the recipes have, writes it" in page.text
    assert "event files of this run have reduced_train_loss" in page.text
    assert "nemo-upcycle evaluate writes them" in page.text
    assert "follows from the options" in page.text
    assert "No data, see the page: Loss, Load of experts" in result.stderr


def test_a_dense_run_has_no_experts(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "dense", experts=None))
    assert page.text.count("The model of this run has no experts.") == 4
    assert "the dense model, trained on from models/dense" in page.text


def test_the_speed_where_the_peak_is_unknown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", scalars={"mfu": {}, "tflops_per_gpu": {1: 2.0, 2: 3.0}})
    page = written(run)
    assert page.data["speed"]["y"] == "TFLOP/s per GPU"
    assert "MFUCallback(peak_tflops=…)" in page.text


def test_step_0_is_told_as_it_is(tmp_path: Path) -> None:
    inexact = "not exact: the initializer drop(ratio=0.5) makes experts unlike the dense layer"
    page = written(write_run(tmp_path / "drop", record={"step0": inexact}))
    assert "Step 0: not exact The initializer drop(ratio=0.5) makes" in page.text
    page = written(write_run(tmp_path / "old", record={"step0": None}))
    assert "Step 0: exact" in page.text
    assert "follows from the options" in page.text
    page = written(write_run(tmp_path / "new", record={"weights": "random weights"}))
    assert "Step 0: not recorded" in page.text


def test_runs_on_other_data_do_not_compare(tmp_path: Path) -> None:
    settings = {"data.seed": 1, "data.seq_length": 256}
    run = write_run(tmp_path / "run", record={"settings": settings})
    other = write_run(
        tmp_path / "other", experts=None, record={"settings": {**settings, "data.seed": 2}}
    )
    page = written(run, "--dense", other)
    assert "The runs' data.seed differs, so the losses are of other tokens." in page.text


def test_a_run_of_megatron_lm(tmp_path: Path) -> None:
    source = write_run(tmp_path / "source")
    run = tmp_path / "lm"
    run.mkdir()
    origin = {
        "dense_checkpoint": "models/dense",
        "fingerprint": "abc",
        "upcycling": {"num_moe_experts": 8, "moe_layer_freq": [0, 1, 1, 1]},
        "weights": "a dense checkpoint",
        "step0": "exact: experts are the dense layer",
        "kept": {"max_position_embeddings": 256},
    }
    (run / UPCYCLED_FROM).write_text(json.dumps(origin))
    page = written(run)
    assert "E8T2, upcycled from models/dense" in page.text
    assert "Step 0: exact" in page.text
    assert "(0, 1, 1, 1)" in page.text
    assert page.data == {}
    assert source.exists()


def test_events_are_found_where_nemo_puts_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "tb_logs").mkdir()
    (run / "logs").rename(tmp_path / "tb_logs" / "run")
    assert "loss" in written(run).data


def test_scores_of_another_run_are_not_taken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "e8t2")
    write_scores(tmp_path / "evaluation", "demo/e8t2b/checkpoints/last")
    assert "scores" not in written(run).data
    assert "scores" in written(run, "--scores", tmp_path / "evaluation").data
    write_scores(tmp_path / "e8t2_100_steps_scores", "demo/e8t2_100_steps_hf", dense=False)
    assert len(written(run).data["scores"]["names"]) == 1


# --- Names that would break out -------------------------------------------------------------------


def test_names_stay_text(tmp_path: Path) -> None:
    evil_name = EVIL.replace("/", "")
    run = write_run(
        tmp_path / evil_name,
        EVIL,
        record={"step0": f"exact: {EVIL}", "mapping": None, "fingerprint": EVIL},
    )
    dense = write_run(tmp_path / f"dense{evil_name}", experts=None)
    write_scores(run / "evaluation", f"x/{evil_name}/y")
    (found,) = (run / "evaluation").glob("results.json")
    content = json.loads(found.read_text())
    content["results"] = {EVIL: content["results"]["next_line"]}
    found.write_text(json.dumps(content))
    plain = written(write_run(tmp_path / "plain"), "--dense", dense)
    page = written(run, "--dense", dense)
    assert {*page.tags} <= {*plain.tags} | {"dl", "dt", "dd"}
    assert page.tags.count("script") == 2
    assert "b" not in page.tags
    assert "img" not in page.tags
    assert f"E8T2, upcycled from {EVIL}" in page.text
    assert page.data["loss"]["series"][0]["name"] == f"dense{evil_name}, training"
    assert page.data["scores"]["rows"][0]["label"] == f"{EVIL}, acc"


# --- Bad input ------------------------------------------------------------------------------------


def test_no_run(tmp_path: Path) -> None:
    assert "is no directory; expected the directory of a run" in refused(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("x")
    assert "is no directory" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "has no complete checkpoint" in refused(tmp_path / "empty")
    assert [*(tmp_path / "empty").iterdir()] == []


def test_the_runs_the_wrong_way_round(tmp_path: Path) -> None:
    run, dense = write_run(tmp_path / "moe"), write_run(tmp_path / "dense", experts=None)
    assert "is a run of 8 experts; expected the run that trains" in refused(dense, "--dense", run)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (LOADS, "{}\n", "line 1 is no measurement"),
        (UPCYCLED_FROM, "{", "cannot be read as JSON"),
        (UPCYCLED_FROM, "[1]", "holds a list; expected a JSON object"),
        ("evaluation/results.json", "{", "cannot be read as JSON"),
        ("evaluation/results.json", "[]", "has no results"),
        ("evaluation/other.json", "{}", "has no results.json"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(
    tmp_path: Path, file: str, content: str, said: str
) -> None:
    run = write_run(tmp_path / "run")
    (run / "report.html").write_text("the earlier page")
    path = run / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    words = ["--scores", run / "evaluation"] if file.startswith("evaluation") else []
    assert said in refused(run, *words)
    assert (run / "report.html").read_text() == "the earlier page"
    assert not [*run.glob("*.partial")]


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "is a directory; expected a file" in refused(run, "--out", tmp_path)
    (run / "report.html").mkdir()
    refused(run)
    assert not [*run.glob("*.partial")]
    assert report(run, "--out", tmp_path / "new" / "page.html").exit_code == 0
    assert (tmp_path / "new" / "page.html").exists()


def test_a_live_run_is_drawn_as_far_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / LOADS).open("a") as file:
        file.write('{"step":101,"lo')
    assert len(written(run).data["load"]["at"]) == len(read_loads(run / LOADS))


def test_without_matplotlib_and_nemo(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    script = (
        "import sys\n"
        "for name in ('matplotlib', 'nemo', 'nemo_run', 'lightning', 'megatron'):\n"
        "    sys.modules[name] = None\n"
        "from nemo_upcycle.cli import app\n"
        f"app(['report', {str(run)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").exists()
