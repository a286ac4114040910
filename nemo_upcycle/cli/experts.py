"""The options for experts: what the feed-forward layers become, in the words of a command line."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nemo_upcycle.config import UpcyclingConfig

Experts = Annotated[
    int | None,
    typer.Option(
        "--experts",
        help="Experts per MoE layer. Default: 8 times the granularity.",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None, typer.Option("--topk", help="Experts per token. Default: 2.", show_default=False)
]
Granularity = Annotated[
    int | None,
    typer.Option(
        "--granularity",
        help="Shards that the dense feed-forward layer is cut into. Default: 1.",
        show_default=False,
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        help="MoE layers: N for every N-th, or skip_first=2,skip_last=1. Default: all.",
        show_default=False,
    ),
]
Initializer = Annotated[
    str | None,
    typer.Option(
        "--initializer",
        help="Initializer of experts, such as drop(ratio=0.5). Default: copy.",
        show_default=False,
    ),
]

_FIELDS = {
    "experts": "num_moe_experts",
    "topk": "moe_router_topk",
    "granularity": "granularity",
    "layers": "moe_layer_freq",
    "initializer": "initializer",
}
"""The options, and the fields of `UpcyclingConfig`."""


def expert_values(**options: Any) -> dict[str, Any]:
    """Return the options that were given, by fields of `UpcyclingConfig`.

    Args:
        options: The values of `experts`, `topk`, `granularity`, `layers` and `initializer`, or of
            fields; None means not given.
    """
    return {_FIELDS.get(name, name): value for name, value in options.items() if value is not None}


def expert_settings(**options: Any) -> list[str]:
    """Return the options that were given as KEY=VALUE, the arguments of a recipe.

    Args:
        options: As of `expert_values`.
    """
    return [f"{name}={value}" for name, value in expert_values(**options).items()]


def upcycling_config(**options: Any) -> "UpcyclingConfig":
    """Return what the options ask for; without an option, E8T2 of copies.

    Args:
        options: As of `expert_values`.

    Raises:
        UpcyclingError: A value is out of range or contradicts another, or there is no such
            initializer.
    """
    from nemo_upcycle_recipes.arguments import with_experts

    from nemo_upcycle.config import UpcyclingConfig

    return with_experts(UpcyclingConfig(), expert_values(**options))
