"""`nemo-upcycle upcycle`: a Hugging Face MoE directory straight from a dense one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_upcycle.cli.experts import (
    Experts,
    Granularity,
    Initializer,
    Layers,
    TopK,
    upcycling_config,
)
from nemo_upcycle.cli.grow import check_no_ways, grow
from nemo_upcycle.cli.tools import before_serving, one_line_errors, show_lines
from nemo_upcycle.progress import progress, size

if TYPE_CHECKING:
    from nemo_upcycle.engine.upcycled_directory import UpcycledDirectory

_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@one_line_errors
def upcycle(
    dense: Annotated[
        str,
        typer.Argument(
            help="The dense checkpoint: a directory of Hugging Face, NeMo 2 or Megatron-LM, or a "
            "name in the local hub cache; several, separated by semicolons, give experts in turn. "
            "Or a Mixture-of-Experts model of Hugging Face, which becomes larger."
        ),
    ],
    directory: Annotated[Path, typer.Argument(help="Directory to create.")],
    experts: Experts = None,
    topk: TopK = None,
    granularity: Granularity = None,
    initializer: Initializer = None,
    layers: Layers = None,
    shared_expert: Annotated[
        bool, typer.Option("--shared-expert", help="Keep the dense layer as an expert for all.")
    ] = False,
    pre_softmax: Annotated[
        bool, typer.Option("--pre-softmax", help="Softmax over all experts, before top-k.")
    ] = False,
    shared_expert_size: Annotated[
        float | None,
        typer.Option(help="Keep so many neurons of the dense layer, or a fraction, for all."),
    ] = None,
    score_function: Annotated[
        str | None, typer.Option(help="softmax or sigmoid. Default: softmax.")
    ] = None,
    expert_bias: Annotated[
        bool, typer.Option("--expert-bias", help="A bias per expert; needs sigmoid.")
    ] = False,
    weight_scaling: Annotated[
        str | None, typer.Option(help="exact, paper or none. Default: exact where possible.")
    ] = None,
    router_initializer: Annotated[
        str | None,
        typer.Option(
            help="Initializer of routers, such as random or centroids(stats='FILE'). Default: "
            "virtual_groups."
        ),
    ] = None,
    router_init_std: Annotated[float | None, typer.Option(help="Default: 0.02.")] = None,
    router_noise: Annotated[
        float | None,
        typer.Option(
            help="Of a larger Mixture-of-Experts model: noise on the copies' router rows, relative "
            "to the router's standard deviation. Default: 0 if the function is kept, else 0.01."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: 1234.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. Default: the dense checkpoint's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be written; write nothing.")
    ] = False,
) -> None:
    """Write a dense checkpoint as a Mixture-of-Experts model that `transformers` loads.

    From a Mixture-of-Experts model, write a larger one: experts are duplicated (arXiv 2604.19835).

    No GPU and no training: the weights are those that a run has before its first step. They are
    streamed, so that memory does not grow with the model. Tokenizer, generation config, chat
    template, licence and model card come along. The architecture is chosen as by `export`.

    \b
    Examples:
      nemo-upcycle upcycle SmolLM2-135M SmolLM2-E8T2
      nemo-upcycle upcycle Llama-3.1-8B OUT --granularity 4 --topk 8 --dry-run
      nemo-upcycle upcycle Qwen3-8B OUT --initializer "drop(ratio=0.5)"
    """
    from nemo_upcycle.checkpoint.described import moe_here
    from nemo_upcycle.engine.upcycled_directory import plan_directory, upcycle_directory
    from nemo_upcycle.errors import UpcyclingError
    from nemo_upcycle.trained.growth import Growth
    from nemo_upcycle.trained.outputs import check_new

    if dtype is not None and dtype not in _DTYPES:
        raise UpcyclingError(f"--dtype is {dtype}; expected one of: {', '.join(_DTYPES)}.")
    stored = None if dtype is None else _DTYPES[dtype]
    ways = {
        "granularity": granularity,
        "initializer": initializer,
        "layers": layers,
        "moe_shared_expert": shared_expert or None,
        "moe_router_pre_softmax": pre_softmax or None,
        "moe_shared_expert_intermediate_size": shared_expert_size,
        "moe_router_score_function": score_function,
        "moe_router_enable_expert_bias": expert_bias or None,
        "weight_scaling": weight_scaling,
        "router_initializer": router_initializer,
        "router_init_std": router_init_std,
    }
    if moe_here(dense) is not None:
        check_no_ways(dense, ways)
        growth = Growth(experts, topk, router_noise, 1234 if seed is None else seed)
        grow(dense, directory, growth, stored, dry_run)
        return
    if router_noise is not None:
        raise UpcyclingError(
            f"--router-noise is {router_noise:g} for the dense model {dense}; expected the option "
            "for a Mixture-of-Experts model alone. Routers of a dense model have "
            "--router-initializer."
        )
    upcycling = upcycling_config(experts=experts, topk=topk, seed=seed, **ways)
    if dry_run:
        plan = plan_directory(dense, upcycling, stored)
        check_new(directory.expanduser(), plan.inputs)
        _show(plan, f"would be written to {directory}")
        return
    with progress(directory.name, in_bytes=True) as show:
        plan, report = upcycle_directory(dense, directory, upcycling, stored, show)
    _show(plan, f"written to {directory} in {report.seconds:.1f} s")


def _show(plan: "UpcycledDirectory", what: str) -> None:
    from nemo_upcycle.plans.report import number

    model, dense = plan.model, plan.prepared
    typer.echo(
        f"{dense.name} → {plan.family.class_name}, {dense.upcycling.label}: "
        f"{number(plan.parameters)} parameters, {number(plan.active_parameters)} per token"
    )
    lines = {
        "experts": f"{model.num_experts} in each of {sum(model.is_moe)} of "
        f"{len(model.is_moe)} layers, {model.topk} per token, {model.expert_width:,} neurons each",
        "weights": f"{size(plan.bytes)} of {plan.dtype}, {what}",
        "step 0": str(plan.exactness),
    }
    show_lines(lines, plan.notes)
    before_serving(plan.family.model_type)
