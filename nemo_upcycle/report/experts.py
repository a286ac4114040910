"""The figures of experts and routers: load, entropy, drift."""

import math
from typing import Any

from nemo_upcycle.engine.load_record import LOADS, Loads, thinned
from nemo_upcycle.report.figures import (
    LAYER_POINTS,
    Axis,
    Figure,
    Table,
    line,
    lines,
    no_events,
)
from nemo_upcycle.report.runs import Run

CELLS, SNAPSHOTS = 200_000, 200
"""Maximum numbers of values and of steps in the heat map."""

_BY = "MoEHealthCallback, which the recipes have, logs it."


def load_figure(axis: Axis, run: Run) -> Figure:
    """Return the load of every expert in every layer over the run."""
    title = "Load of experts"
    if why := _without_experts(run):
        return Figure("load", title, missing=why)
    if not (run.loads and run.loads[0].relative):
        return Figure(
            "load",
            title,
            missing=f"The run has no {LOADS}. MoEHealthCallback, which the recipes have, writes "
            "it; earlier versions drew moe_load.png alone.",
        )
    layers = list(run.loads[0].relative)
    experts = max(len(shares) for shares in run.loads[0].relative.values())
    most = max(2, min(SNAPSHOTS, CELLS // (len(layers) * experts)))
    # The last measurement is always there.
    drawn = [*thinned(run.loads[:-1], most - 1), run.loads[-1]]
    chart = {
        "kind": "heat",
        "x": "expert",
        "y": "layer",
        "layers": layers,
        "experts": experts,
        "at": [_place(axis, run, each) for each in drawn],
        "values": [
            [[round(100 * share) for share in shares] for shares in each.relative.values()]
            for each in drawn
        ],
    }
    caption = (
        f"Tokens that each of {experts} experts gets, relative to an even share. 1 is even, 2 "
        f"twice as many. {len(drawn)} of {len(run.loads)} measurements. At the last, "
        f"{_extremes(run.loads[-1])}"
    )
    return Figure("load", title, caption, chart, table=_table(run.loads[-1]))


def entropy_figure(axis: Axis, run: Run) -> Figure:
    """Return the routers' entropy per layer."""
    even = math.log(run.experts) if run.experts else None
    caption = "Entropy of the router's scores over all experts, which sum to 1, as a mean over "
    caption += "tokens. 0: always one expert."
    more: dict[str, Any] = {}
    if even is not None:
        caption += f" ln {run.experts} = {even:.2f}: all experts alike."
        more = {"reference": {"y": even, "name": f"ln {run.experts}, all experts alike"}}
    return _per_layer(
        axis, run, "entropy", "Router entropy", "router_entropy", "entropy (nats)", caption, more
    )


def bias_figures(axis: Axis, run: Run) -> list[Figure]:
    """Return the range of the experts' biases per layer; nothing for a run without biases."""
    if not axis.curve(run, "moe/expert_bias_range", done=0):
        return []
    caption = "The largest expert bias of a layer minus the smallest. 0: no bias has moved yet. A "
    caption += "bias changes which experts are chosen, and never their weights."
    return [
        _per_layer(
            *(axis, run, "bias", "Expert bias", "expert_bias_range"),
            *("largest minus smallest", caption),
        )
    ]


def drift_figures(axis: Axis, run: Run) -> list[Figure]:
    """Return how far experts are from each other, and routers from where they began."""
    experts = (
        "Mean distance between a layer's experts, relative to the weights of the dense "
        "feed-forward layer. 0: the experts are copies, as after upcycling with copy."
    )
    routers = "Distance of a router from the initial router, relative to the initial router."
    return [
        _per_layer(
            *(axis, run, "experts", "Drift: between experts", "expert_distance"),
            *("relative distance", experts),
        ),
        _per_layer(
            *(axis, run, "routers", "Drift: routers from their start", "router_distance"),
            *("relative distance", routers),
        ),
    ]


def _per_layer(
    axis: Axis,
    run: Run,
    name: str,
    title: str,
    metric: str,
    label: str,
    caption: str,
    more: dict[str, Any] | None = None,
) -> Figure:
    if why := _without_experts(run):
        return Figure(name, title, missing=why)
    tag = f"moe/{metric}"
    mean = axis.curve(run, tag, done=0)
    if not mean:
        return Figure(name, title, missing=no_events(tag, _BY))
    prefix = f"{tag}_layer_"
    ends = [each.removeprefix(prefix) for each in run.scalars if each.startswith(prefix)]
    numbers = sorted(int(end) for end in ends if end.isdecimal())
    curves = {n: axis.curve(run, f"{prefix}{n}", done=0, most=LAYER_POINTS) for n in numbers}
    layers = [{"layer": n, "points": curve} for n, curve in curves.items() if curve]
    series = [line("mean over layers", "mean", mean)]
    caption += f" From {mean[0][1]:.3g} to {mean[-1][1]:.3g} on average."
    return lines(name, title, caption, axis, label, series, layers=layers, **(more or {}))


def _without_experts(run: Run) -> str:
    if run.record and run.experts is None and not run.loads:
        return "The model of this run has no experts."
    return ""


def _place(axis: Axis, run: Run, loads: Loads) -> dict[str, Any]:
    tokens = axis.at(run, loads.step) if axis.in_tokens else None
    return {"step": loads.step, "tokens": tokens}


def _extremes(loads: Loads) -> str:
    cells = [
        (share, layer, expert)
        for layer, shares in loads.relative.items()
        for expert, share in enumerate(shares)
    ]
    dead = sum(share == 0 for share, _, _ in cells)
    (least, *least_at), (most, *most_at) = min(cells), max(cells)
    said = (
        f"step {loads.step}: most {most:.2f} (layer {most_at[0]}, expert {most_at[1]}), least "
        f"{least:.2f} (layer {least_at[0]}, expert {least_at[1]})"
    )
    return f"{said}, {dead} without a token." if dead else f"{said}."


def _table(loads: Loads) -> Table:
    """Return the loads of one measurement, one row per layer."""
    experts = max(len(shares) for shares in loads.relative.values())
    rows = [
        [f"layer {layer}", *(f"{share:.2f}" for share in shares)]
        for layer, shares in loads.relative.items()
    ]
    header = [f"step {loads.step}, relative to even", *(f"expert {e}" for e in range(experts))]
    return Table(header, rows)
