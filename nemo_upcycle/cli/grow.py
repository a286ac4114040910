"""`nemo-upcycle upcycle` of a Mixture-of-Experts model: a larger one."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nemo_upcycle.cli.tools import before_serving, show_lines
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.progress import progress, size

if TYPE_CHECKING:
    from nemo_upcycle.trained.growth import GrownDirectory, Growth


def check_no_ways(source: str, ways: Mapping[str, object]) -> None:
    """Check that no option is given that says what a dense layer becomes.

    Args:
        source: The Mixture-of-Experts model.
        ways: Values by fields of `UpcyclingConfig`; None means not given.

    Raises:
        UpcyclingError: An option is given.
    """
    given = [name for name, value in ways.items() if value is not None]
    if given:
        raise UpcyclingError(
            f"{source} is a Mixture-of-Experts model already, and {', '.join(given)} is given, "
            "which says what a dense layer becomes. A larger model has copies of the experts; "
            "expected --experts, --topk, --router-noise, --seed and --dtype alone."
        )


def grow(source: str, directory: Path, growth: "Growth", dtype: str | None, dry_run: bool) -> None:
    """Write a larger Mixture-of-Experts model, or show what would be written.

    Args:
        source: The Mixture-of-Experts model.
        directory: Directory to create.
        growth: What the model becomes.
        dtype: safetensors' name; None keeps the source's.
        dry_run: Whether to write nothing.
    """
    from nemo_upcycle.trained.grown_directory import grow_directory
    from nemo_upcycle.trained.growth import plan_growth
    from nemo_upcycle.trained.outputs import check_new

    if dry_run:
        plan = plan_growth(source, growth, dtype)
        check_new(directory.expanduser(), [plan.directory])
        _show(plan, f"would be written to {directory}")
        return
    with progress(directory.name, in_bytes=True) as show:
        plan = grow_directory(source, directory, growth, dtype, show)
    _show(plan, f"written to {directory}")


def _show(plan: "GrownDirectory", what: str) -> None:
    from nemo_upcycle.plans.report import number

    model, before = plan.model, plan.source.model
    typer.echo(
        f"{plan.directory.name} → {plan.family.class_name} of {model.num_experts} experts: "
        f"{number(plan.parameters)} parameters, {number(plan.active_parameters)} per token"
    )
    lines = {
        "experts": f"{model.num_experts} in each of {sum(model.is_moe)} of {len(model.is_moe)} "
        f"layers, {model.topk} per token; before {before.num_experts} and {before.topk}",
        "weights": f"{size(plan.bytes)}, {what}",
        "step 0": str(plan.exactness),
    }
    show_lines(lines, plan.notes)
    before_serving(plan.family.model_type)
