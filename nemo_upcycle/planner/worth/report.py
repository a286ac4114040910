"""Show whether upcycling pays: tables and sentences for people, JSON for programs."""

from collections.abc import Callable, Iterator
from math import isfinite
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nemo_upcycle.planner.report import prediction_json
from nemo_upcycle.planner.search import Prediction
from nemo_upcycle.planner.worth.comparison import (
    SAME_COST,
    SAME_TOKENS,
    SCRATCH,
    UPCYCLE,
    Worth,
    hours_per_token,
    parameters_of,
)
from nemo_upcycle.planner.worth.law import FARTHEST_TOKENS, LEAST_TOKENS, Interval, break_even
from nemo_upcycle.planner.worth.published import (
    MEASURED,
    OLMOE,
    OLMOE_PARAMETERS,
    OLMOE_TOKENS,
    measured_json,
)
from nemo_upcycle.planner.worth.scope import short

WORDS = {
    UPCYCLE: "upcycle",
    SAME_TOKENS: "dense on, same tokens",
    SAME_COST: "dense on, same GPU-hours",
    SCRATCH: "MoE from scratch, same loss",
}
"""The ways, in words."""

_VERDICTS = {
    SCRATCH: ("to the same loss, upcycling costs", "less", "more", "the MoE from scratch"),
    SAME_TOKENS: ("upcycling ends at", "a lower loss", "a higher loss", "the dense model, same "
                  "tokens"),
    SAME_COST: ("upcycling ends at", "a lower loss", "a higher loss", "the dense model, same "
                "GPU-hours"),
}  # fmt: skip


def render(found: Worth, title: str, price: float | None = None) -> RenderableType:
    """Show the costs, and the losses or why there are none.

    Args:
        found: The comparison.
        title: Title of the report.
        price: Price per GPU-hour; None leaves out the costs in money.
    """
    parts: list[RenderableType] = [Text(title, style="bold"), _models(found), _ways(found, price)]
    parts.append(Text(_sunk(found, price)))
    if found.outside:
        parts += _refusal(found)
    if found.has_losses:
        mark = ", extrapolated" if found.extrapolated else ""
        parts.append(Text(f"\nWhat the law says{mark}", style="bold"))
        parts += [_indented(line) for line in sentences(found)]
    parts.append(Text(f"\n{_caveat(found)}", style="dim"))
    return Group(*parts)


def _models(found: Worth) -> Table:
    table = _table("", "parameters", "active", "MFU", "GPU-hours per 1B")
    table.columns[0].no_wrap = False
    for name, one in (("MoE", found.moe), ("dense", found.dense)):
        total, active = parameters_of(one.workload)
        label = f"{name}: {one.mapping.folding}"
        table.add_row(
            label, short(total), short(active), f"{one.mfu:.1%}", hours(1e9 * hours_per_token(one))
        )
    return table


def _ways(found: Worth, price: float | None) -> Table:
    money = [] if price is None else ["cost"]
    table = _table("", "tokens", "GPU-hours", *money, "loss")
    most = found.most_tokens
    for name, way in found.ways.items():
        dearest = most * hours_per_token(found.moe)
        spent = [_range(way.gpu_hours, hours, dearest)]
        if price is not None:
            cost = way.gpu_hours and way.gpu_hours.times(price)
            spent.append(_range(cost, hours, dearest * price))
        loss = _range(way.loss, "{:.2f}".format)
        table.add_row(WORDS[name], _range(way.tokens, short, most), *spent, loss)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    return table


def _range(
    interval: Interval | None, text: Callable[[float], str], most: float | None = None
) -> str:
    """Return an interval as text: `?` without one, `>` beyond the most that the law is asked."""
    if interval is None:
        return "?"

    def one(value: float) -> str:
        return f">{text(most)}" if most is not None and value > most else text(value)

    low, high = one(interval.low), one(interval.high)
    if interval.is_exact:  # given or computed without the law, which then is not asked
        return text(interval.value)
    return low if low == high else f"{low}–{high}"


def hours(value: float) -> str:
    """Return GPU-hours or money as text, with three digits below 1,000."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _sunk(found: Worth, price: float | None) -> str:
    spent = found.sunk_hours
    share = found.tokens * hours_per_token(found.moe) / spent
    return (
        f"Sunk and not counted: the dense pre-training, {short(found.dense_tokens)} tokens, "
        f"{hours(spent)} GPU-hours on these GPUs{_in_money(spent, price)}. Upcycling is "
        f"{hours(100 * share)}% of that."
    )


def _in_money(spent: float, price: float | None) -> str:
    return "" if price is None else f", {hours(spent * price)} at this price"


def _refusal(found: Worth) -> Iterator[RenderableType]:
    head = (
        "Extrapolated: these losses are outside of the law's range"
        if found.extrapolated
        else "No loss is predicted: outside of the range of the law of arXiv 2502.03009"
    )
    yield Text(f"\n{head}", style="bold")
    for line in found.outside:
        yield _indented(f"{line}.")
    if found.extrapolated:
        yield _indented(f"Measured: {OLMOE}")
        yield _indented(f"{olmoe_by_the_law()}")
    else:
        yield _indented(
            "The MoE from scratch costs as much per token as upcycling. How many tokens it takes "
            "to the same loss, only the law could say."
        )
        yield _indented("--extrapolate prints the law's numbers all the same.")
    yield Text("\nMeasured by others, nearest to this", style="bold")
    for one in MEASURED:
        if not (found.extrapolated and one is OLMOE):
            yield _indented(str(one))


def _indented(line: str) -> Padding:
    return Padding(line, (0, 0, 0, 2))


def olmoe_by_the_law() -> str:
    """Return what the law says of OLMoE's measurement, in a sentence."""
    found = break_even(OLMOE_PARAMETERS, OLMOE_TOKENS, FARTHEST_TOKENS)
    value = f"at {short(found.value)}" if isfinite(found.value) else "never"
    high = short(found.high) if isfinite(found.high) else "never"
    return (
        f"For that run the law as printed says that the MoE from scratch catches up {value} "
        f"(rounding allows {short(found.low)} to {high})."
    )


def sentences(found: Worth) -> Iterator[str]:
    """Yield what the law says, one sentence per thought."""
    now, even = found.dense_now, found.break_even
    if now is None or even is None:
        return
    yield f"The dense model now: loss {_range(now, '{:.2f}'.format)}."
    yield _of_break_even(even, found.most_tokens)
    for name, is_better in found.advantages.items():
        what, better, worse, other = _VERDICTS[name]
        if is_better is None:
            yield f"Against {other}: undecided, the printed digits allow both."
        else:
            yield f"Against {other}: {what} {better if is_better else worse}."
    left_out = [WORDS[name] for name in (SAME_TOKENS, SAME_COST) if name not in found.advantages]
    if left_out:
        yield f"No loss for {' and '.join(left_out)}: more than {short(found.most_tokens)} in all."
    loss = found.ways[UPCYCLE].loss
    if loss is not None and loss.value > now.value:
        yield (
            "The upcycled model's loss is above that of the dense model that it begins with: the "
            "laws were fitted one by one, and disagree here."
        )


def _of_break_even(even: Interval, most: float) -> str:
    def text(tokens: float) -> str:
        if tokens <= LEAST_TOKENS:
            return f"{short(LEAST_TOKENS)} or less"
        return short(tokens) if isfinite(tokens) else f"none up to {short(most)}"

    said = text(even.value)
    low, high = text(even.low), text(even.high)
    allowed = "" if even.is_exact else f" (the printed digits allow {low} to {high})"
    return f"Break-even, the tokens where the MoE from scratch catches up: {said}{allowed}."


def _caveat(found: Worth) -> str:
    caveat = (
        "GPU-hours are those of the planner's best mappings; loading, evaluation and restarts are "
        "not counted. An MoE needs the memory of all its parameters to serve."
    )
    if found.has_losses:
        caveat += (
            " Losses: arXiv 2502.03009, Table 2, as printed and not fitted again; ranges are what "
            "the rounding of the printed numbers alone allows, true errors are larger. Losses "
            "differ with tokenizer and data: only their differences mean something."
        )
    return caveat


def to_json(found: Worth, price: float | None = None) -> dict[str, Any]:
    """Return the comparison as JSON objects.

    Args:
        found: The comparison.
        price: Price per GPU-hour.

    Returns:
        - `parameters` (N1), `dense_tokens` (D1), `tokens` (D2), `price`.
        - `moe` and `dense`: the best mappings, as of `planner.report.prediction_json`, with
          `parameters`, `active_parameters` and `gpu_hours_per_token`.
        - `sunk_gpu_hours`: of the dense pre-training.
        - `ways`: by name, `tokens`, `gpu_hours`, `cost` and `loss`. Each is null, or has `low`,
          `value` and `high`, which are null where infinite. `cost` is null without a price.
        - `dense_loss`, `break_even`: of the same form.
        - `advantages`: whether upcycling is better than each other way; null if undecided.
        - `outside`: what is outside of the law's range; `extrapolated`: whether the law is used
          all the same.
        - `measured`: published comparisons.
    """
    return {
        "parameters": found.parameters,
        "dense_tokens": found.dense_tokens,
        "tokens": found.tokens,
        "price": price,
        "moe": _model_json(found.moe),
        "dense": _model_json(found.dense),
        "sunk_gpu_hours": found.sunk_hours,
        "ways": {
            name: {
                "tokens": _interval_json(way.tokens),
                "gpu_hours": _interval_json(way.gpu_hours),
                "cost": _interval_json(
                    None if price is None else way.gpu_hours and way.gpu_hours.times(price)
                ),
                "loss": _interval_json(way.loss),
            }
            for name, way in found.ways.items()
        },
        "dense_loss": _interval_json(found.dense_now),
        "break_even": _interval_json(found.break_even),
        "advantages": found.advantages,
        "outside": list(found.outside),
        "extrapolated": found.extrapolated,
        "measured": measured_json(),
    }


def _model_json(one: Prediction) -> dict[str, Any]:
    total, active = parameters_of(one.workload)
    return prediction_json(one) | {
        "parameters": total,
        "active_parameters": active,
        "gpu_hours_per_token": hours_per_token(one),
    }


def _interval_json(interval: Interval | None) -> dict[str, float | None] | None:
    if interval is None:
        return None
    return {name: value if isfinite(value) else None for name, value in interval._asdict().items()}
