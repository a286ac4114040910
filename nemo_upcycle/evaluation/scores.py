"""Scores side by side: the MoE, the dense model and the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from nemo_upcycle.evaluation.tasks import PAPER, PaperRow, Request

Results = Mapping[Request, Mapping[str, Any]]
"""lm-eval's results of a model, by request."""


@dataclass(frozen=True)
class Score:
    """A row of the table: a metric of a task.

    Attributes:
        task: lm-eval's name, indented as in lm-eval's own table.
        num_fewshot: Examples before each question.
        metric: lm-eval's name.
        values: Value and standard error per model; None for a model without results.
    """

    task: str
    num_fewshot: str
    metric: str
    values: tuple[tuple[float, float | None] | None, ...]


def scores(models: Sequence[Results]) -> list[Score]:
    """Return the scores of several models, one row per metric of a group or ungrouped task.

    Args:
        models: Results of each model; the first model's results determine the rows.
    """
    rows = []
    for request, results in models[0].items():
        others = [model.get(request, {}).get("results", {}) for model in models[1:]]
        for task in _top_level(results):
            metrics = results["results"][task]
            shots = results.get("n-shot", {}).get(task, request.num_fewshot)
            for key in metrics:
                name, _, kind = key.partition(",")
                if not kind or name.endswith("_stderr"):
                    continue
                values = [_value(each.get(task, {}), key) for each in (results["results"], *others)]
                if values[0] is not None:
                    rows.append(Score(task, _shots(shots), name, tuple(values)))
    return rows


def _top_level(results: Mapping[str, Any]) -> list[str]:
    inside = {task for tasks in results.get("group_subtasks", {}).values() for task in tasks}
    return [task for task in results["results"] if task not in inside]


def _shots(shots: Any) -> str:
    return "" if shots is None or shots == {} else str(shots)


def _value(metrics: Mapping[str, Any], key: str) -> tuple[float, float | None] | None:
    value = metrics.get(key)
    if not isinstance(value, int | float):
        return None
    name, _, kind = key.partition(",")
    error = metrics.get(f"{name}_stderr,{kind}")
    return float(value), float(error) if isinstance(error, int | float) else None


def paper_score(results: Results, row: PaperRow) -> float | None:
    """Return a model's score for a column of the paper's table, in %; None if not evaluated."""
    for request, each in results.items():
        metrics = each.get("results", {}).get(row.task)
        if metrics and row.task in request.tasks and request.num_fewshot == row.num_fewshot:
            for key, value in metrics.items():
                if key.partition(",")[0] == row.metric:
                    return 100 * float(value)
    return None


def row_lengths(names: Sequence[str], models: Sequence[Results]) -> str:
    """Describe the row length in tokens, and whether all models had the same.

    Args:
        names: Name of each model.
        models: Results of each model.
    """
    lengths = [row_length(model) for model in models]
    if len(set(lengths)) == 1:
        return f"Rows are cut at {lengths[0]} tokens." if lengths[0] else ""
    said = [
        f"{length} tokens of the {name}" if length else f"a length of the {name} that is not said"
        for name, length in zip(names, lengths, strict=True)
    ]
    return f"Rows are cut at {' and '.join(said)}: longer texts do not compare."


def row_length(results: Results) -> int | None:
    """Return the maximum number of tokens per row; None if the results do not record this."""
    for each in results.values():
        # This package's key first, then that of lm-eval's own command line.
        length = each.get("config", {}).get("max_length") or each.get("max_length")
        if isinstance(length, int):
            return length
    return None


def markdown(names: Sequence[str], models: Sequence[Results], paper: bool) -> str:
    """Return the table in markdown, optionally followed by the paper's table.

    Args:
        names: Name of each model.
        models: Results of each model.
        paper: Whether to add the paper's table.
    """
    blocks = [_lines(_cells(names, models))]
    if paper:
        blocks.append(_lines(_paper_cells(names, models)))
    return "\n\n".join(filter(None, [*blocks, row_lengths(names, models)])) + "\n"


def render(names: Sequence[str], models: Sequence[Results], paper: bool) -> list[Table]:
    """Return the tables of `markdown` for a terminal."""
    tables = [("Scores", _cells(names, models))]
    if paper:
        tables.append(("Table 3 of arXiv 2412.09952, in %", _paper_cells(names, models)))
    return [_table(title, cells) for title, cells in tables]


def _cells(names: Sequence[str], models: Sequence[Results]) -> list[list[str]]:
    header = ["task", "shots", "metric", *names]
    if len(models) == 2:
        header.append("difference")
    cells = [header]
    for score in scores(models):
        row = [score.task, score.num_fewshot, score.metric, *map(_text, score.values)]
        if len(models) == 2:
            first, second = score.values
            row.append(f"{first[0] - second[0]:+.4f}" if first and second else "")
        cells.append(row)
    return cells


def _text(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return ""
    return f"{value[0]:.4f}" + (f" ± {value[1]:.4f}" if value[1] is not None else "")


def _paper_cells(names: Sequence[str], models: Sequence[Results]) -> list[list[str]]:
    cells = [["", "metric", *names, "Llama 3 8B (paper)", "E8T2 (paper)"]]
    columns: list[list[float | None]] = [[paper_score(m, row) for row in PAPER] for m in models]
    columns += [[row.dense for row in PAPER], [row.moe for row in PAPER]]
    for index, row in enumerate(PAPER):
        cells.append([row.name, row.metric, *(_percent(column[index]) for column in columns)])
    means = [sum(c) / len(c) if None not in c else None for c in columns]  # type: ignore[arg-type]
    return [*cells, ["average", "", *map(_percent, means)]]


def _percent(value: float | None) -> str:
    # The paper rounds half up: a mean of .885 is .89.
    return "" if value is None else f"{value + 1e-9:.2f}"


def _lines(cells: list[list[str]]) -> str:
    rule = ["---"] * len(cells[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])


def _table(title: str, cells: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in cells[0]:
        table.add_column(name, justify="left" if name in ("task", "metric", "") else "right")
    for row in cells[1:]:
        table.add_row(*row)
    return table
