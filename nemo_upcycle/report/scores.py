"""What `nemo-upcycle evaluate` has written about a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.scores import Results, scores
from nemo_upcycle.evaluation.tasks import Request
from nemo_upcycle.report.figures import Figure, Table
from nemo_upcycle.report.runs import Run

TITLE = "Scores"
MOE, DENSE = "results", "dense"
"""Beginnings of the names of lm-eval's files, of the evaluated checkpoint and the dense model."""


def scores_figure(run: Run, directory: Path | None) -> Figure:
    """Return the scores of the run and, where evaluated with it, of the dense model.

    Args:
        run: The run.
        directory: What `evaluate --out` was given; None looks in and beside the run's directory.

    Raises:
        UpcyclingError: There are no results in the directory, or a file is damaged.
    """
    found = directory or _directory_of(run)
    if found is None:
        missing = (
            f"No results of {run.name} are in evaluation/ in or beside the run's directory. "
            "nemo-upcycle evaluate writes them; --scores DIR says where they are."
        )
        return Figure("scores", TITLE, missing=missing)
    models = [_results(found, MOE), _results(found, DENSE)]
    if not models[0]:
        raise UpcyclingError(
            f"{found} has no {MOE}.json; expected the directory that `nemo-upcycle evaluate --out` "
            "was given."
        )
    names = [(run.name, "moe"), ("dense", "dense")][: 1 + bool(models[1])]
    rows = scores(models[: len(names)])
    cells = [
        [row.task, row.num_fewshot, row.metric, *(_cell(value) for value in row.values)]
        for row in rows
    ]
    header = ["task", "shots", "metric", *(name for name, _ in names)]
    drawn = [
        {
            "label": f"{row.task.strip()}, {row.metric}",
            "values": [
                None if value is None else {"value": value[0], "error": value[1]}
                for value in row.values
            ],
        }
        for row in rows
        # Perplexities have another scale: they are in the table alone.
        if all(value is None or 0 <= value[0] <= 1 for value in row.values)
    ]
    chart = {
        "kind": "dots",
        "x": "score (0 to 1; bars are ± one standard error)",
        "names": [{"name": name, "role": role} for name, role in names],
        "rows": drawn,
    }
    caption = "lm-eval's scores. Questions per task: " + _questions(models[0]) + "."
    table = Table(header, cells)
    if not drawn:
        return Figure("scores", TITLE, missing="No score lies between 0 and 1.", table=table)
    return Figure("scores", TITLE, caption, chart, table=table)


def _directory_of(run: Run) -> Path | None:
    """Return the latest directory with results of the run, in or beside the run's directory."""
    here = run.directory.resolve()
    candidates = [here / "evaluation", here.parent / "evaluation"]
    candidates += here.parent.glob(f"{_escaped(run.name)}*_scores")
    found = [path for path in candidates if any(_is_of(run, each) for each in _files(path, MOE))]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _files(directory: Path, name: str) -> list[Path]:
    return [*directory.glob(f"{name}.json"), *sorted(directory.glob(f"{name}-*-shot.json"))]


def _is_of(run: Run, path: Path) -> bool:
    """Return whether a file has results of a checkpoint of the run, or of an export of one."""
    config = _read(path).get("config") or {}
    parts = Path(str(config.get("model_source", ""))).parts
    return any(part == run.name or part.startswith(f"{run.name}_") for part in parts)


def _results(directory: Path, name: str) -> Results:
    # Files of both models with the same number of examples go together.
    return {
        Request((path.stem.removeprefix(name),), None): _read(path)
        for path in _files(directory, name)
    }


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UpcyclingError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict) or not isinstance(found.get("results"), dict):
        raise UpcyclingError(f"{path} has no results; expected what lm-eval writes.")
    return found


def _questions(models: Results) -> str:
    counts = {
        task: number.get("effective") if isinstance(number, dict) else number
        for results in models.values()
        for task, number in (results.get("n-samples") or {}).items()
    }
    if not counts:
        return "not recorded"
    if len(set(counts.values())) == 1:
        return str(next(iter(counts.values())))
    return ", ".join(f"{task} {count}" for task, count in counts.items())


def _cell(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "–"
    return f"{value[0]:.4f}" + ("" if value[1] is None else f" ± {value[1]:.4f}")
