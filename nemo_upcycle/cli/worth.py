"""`nemo-upcycle worth`: what upcycling costs and brings, against the alternatives."""

import re
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from nemo_upcycle.cli.experts import Experts, Granularity, Layers, TopK, expert_settings
from nemo_upcycle.cli.plan import HardwareName, dense_model, recipe_for
from nemo_upcycle.cli.tools import check_picture, one_line_errors
from nemo_upcycle.errors import UpcyclingError

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@one_line_errors
def worth(
    dense: Annotated[
        str,
        typer.Option(
            help="The dense checkpoint: a directory, which may hold config.json alone, a "
            "config.json, or a name in the local hub cache.",
        ),
    ],
    dense_tokens: Annotated[
        str, typer.Option(help="Tokens that the dense model has seen: 15T, 74B or 2.5e11.")
    ],
    tokens: Annotated[str, typer.Option(help="Tokens of upcycling: 100B or 1e11.")],
    gpus: Annotated[
        int | None,
        typer.Option(
            help="Number of GPUs. Default: the fewest nodes that fit.", min=1, show_default=False
        ),
    ] = None,
    hardware: HardwareName = "h100",
    experts: Experts = None,
    topk: TopK = None,
    granularity: Granularity = None,
    layers: Layers = None,
    price: Annotated[
        float | None,
        typer.Option(
            help="Price of a GPU-hour, in any currency. Default: GPU-hours alone.",
            show_default=False,
        ),
    ] = None,
    extrapolate: Annotated[
        bool,
        typer.Option(
            "--extrapolate", help="Print losses also outside of the scaling law's range, marked."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Plot loss over GPU-hours (.png, .svg, .pdf).", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say whether to upcycle at all: cost and predicted loss, against three alternatives.

    Upcycling is compared with training the dense model on, for as many tokens and for as many
    GPU-hours, and with the same MoE from scratch. GPU-hours come from the planner's best mapping of
    each model. Losses come from the scaling law of arXiv 2502.03009, and only inside of its range:
    8 experts top-2 in all layers, up to about 1B parameters and 368B tokens. Needs no GPU and no
    weights.

    \b
    Examples:
      nemo-upcycle worth --dense DIR --dense-tokens 74B --tokens 20B --gpus 8 --price 2.5
      nemo-upcycle worth --dense DIR --dense-tokens 74B --tokens 20B --gpus 8 --out worth.png
      nemo-upcycle worth --dense Meta-Llama-3-8B --dense-tokens 15T --tokens 100B --gpus 128
    """
    import json as json_module

    from nemo_upcycle_recipes.expectations import workload
    from rich.console import Console

    from nemo_upcycle.checkpoint.described import config_alone
    from nemo_upcycle.planner.hardware import hardware as read_hardware
    from nemo_upcycle.planner.worth.comparison import worth as compare
    from nemo_upcycle.planner.worth.report import render, to_json
    from nemo_upcycle.planner.worth.scope import short

    seen, more = count("--dense-tokens", dense_tokens), count("--tokens", tokens)
    if price is not None and not (price >= 0 and isfinite(price)):
        raise UpcyclingError(f"--price is {price:g}; expected a number of 0 or more.")
    if out is not None:
        check_picture(out)
    kind = read_hardware(hardware)
    words = expert_settings(experts=experts, topk=topk, granularity=granularity, layers=layers)
    chosen, _ = recipe_for(dense, words, gpus, kind)
    model = dense_model(chosen, dense)
    name = (config_alone(dense) or Path(dense)).resolve().name
    found = compare(
        workload(chosen, model.arch), model, chosen.world_size, kind, seen, more, extrapolate
    )
    if json:
        typer.echo(json_module.dumps(to_json(found, price)))
    else:
        title = (
            f"{name}, {short(found.parameters)} parameters without embeddings, "
            f"{short(seen)} tokens seen → {chosen.upcycling.label} with {short(more)} more, on "
            f"{chosen.world_size} {kind.name}"
        )
        Console(highlight=False).print(render(found, title, price))
    if out is not None:
        from nemo_upcycle.planner.worth.picture import draw

        draw(found, f"{name} → {chosen.upcycling.label}", out)
        typer.echo(out, err=json)


def count(option: str, text: str) -> float:
    """Return a number of tokens, such as 100B or 2.5e11.

    Args:
        option: The option that the text is of.
        text: The text.

    Raises:
        UpcyclingError: The text is no such number.
    """
    match = re.fullmatch(r"(\d+\.?\d*(?:e\+?\d+)?)\s*([kmbt]?)", text.strip(), re.IGNORECASE)
    value = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if not 1 <= value <= 1e18:
        raise UpcyclingError(
            f"{option} is {text!r}; expected a number of tokens, such as 100B, 15T or 2.5e11."
        )
    return value
