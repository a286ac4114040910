"""The planner's predictions for recipes, and the table of recipes in the documents.

`python -m nemo_upcycle_recipes.expectations docs/running.md` writes the table between the markers
of a document; without an argument the command prints the table.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from nemo_upcycle_recipes.numbers import RECIPES
from nemo_upcycle_recipes.recipe import Recipe

from nemo_upcycle.config import RECOMPUTE
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture
from nemo_upcycle.planner.hardware import Hardware, hardware
from nemo_upcycle.planner.search import Prediction, predict
from nemo_upcycle.planner.workload import Mapping, Workload
from nemo_upcycle.plans.job import plan_job

BEGIN, END = "<!-- recipes: generated -->", "<!-- recipes: end -->"
"""The markers before and after the table in a document."""


def workload(recipe: Recipe, arch: Architecture | None = None) -> Workload:
    """Return a recipe's workload, for the recipe's own dense model or another."""
    schedule = recipe.schedule
    return Workload(
        arch or recipe.architecture,
        recipe.upcycling,
        schedule.seq_length,
        schedule.global_batch_size,
        recipe.precision,
        recipe.optimizer,
    )


def mapping(recipe: Recipe) -> Mapping:
    """Return a recipe's mapping."""
    batch = recipe.schedule.micro_batch_size
    return Mapping(recipe.folding, recipe.world_size, batch, recipe.recompute)


def expected(recipe: Recipe, hardware: Hardware) -> Prediction:
    """Predict memory and step time of a recipe with its own mapping.

    Args:
        recipe: The recipe.
        hardware: The GPUs to predict for.

    Raises:
        UpcyclingError: The mapping does not fit the model, or the batch does not divide.
    """
    return predict(workload(recipe), mapping(recipe), hardware)


def summary(prediction: Prediction) -> str:
    """Return a prediction in one line."""
    gpus, hardware = prediction.mapping.world_size, prediction.hardware
    return (
        f"On {gpus} {hardware.name}: {prediction.memory.total / 2**30:.0f} GiB per GPU, "
        f"{prediction.time.total:.2g} s per step, {prediction.mfu:.0%} MFU (predicted)."
    )


def lightest_recompute(recipe: Recipe, hardware: Hardware) -> Prediction:
    """Predict a recipe with the least recompute that fits.

    Args:
        recipe: The recipe.
        hardware: The GPUs to predict for.

    Raises:
        UpcyclingError: No choice of recompute fits.
    """
    has_experts = recipe.upcycling.num_moe_experts is not None
    for name in RECOMPUTE:
        if has_experts or "moe" not in name:
            prediction = expected(replace(recipe, recompute=name), hardware)
            if prediction.fits:
                return prediction
    raise UpcyclingError(f"{recipe.name} does not fit {hardware.name} with any recompute.")


def table(recipes: Iterable[Recipe], hardware: Hardware) -> str:
    """Return the table of recipes as Markdown.

    Args:
        recipes: The recipes, one per row.
        hardware: The GPUs to predict for.
    """
    lines = [
        "| recipe | GPUs | mapping | parameters | the recipe's recompute | the least that fits |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_row(recipe, hardware))} |" for recipe in recipes]
    return "\n".join(lines)


def _row(recipe: Recipe, hardware: Hardware) -> list[str]:
    nodes = recipe.num_nodes, recipe.num_gpus_per_node
    job = plan_job(recipe.dense_model, recipe.upcycling, recipe.folding, *nodes, recipe.precision)
    predictions = expected(recipe, hardware), lightest_recompute(recipe, hardware)
    return [
        f"`{recipe.name}`",
        str(recipe.world_size),
        str(recipe.folding),
        f"{job.parameters / 1e9:.1f}B",
        *(
            f"{one.mapping.recompute}: {one.memory.total / 2**30:.0f} GiB, "
            f"{one.time.total:.2g} s, {one.mfu:.0%} MFU"
            for one in predictions
        ),
    ]


def documented() -> str:
    """Return the table of the documents: the full-size recipes on H100."""
    return table((one for one in RECIPES.values() if "tiny" not in one.name), hardware("h100"))


def with_table(document: str) -> str:
    """Return a document with the table between the markers.

    Raises:
        UpcyclingError: The document has no markers.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise UpcyclingError(f"The document has no {BEGIN} followed by {END}; add both.")
    return f"{before}{begin}\n\n{documented()}\n\n{end}{after}"


def main() -> None:
    """Write the table into the documents on the command line, or print the table."""
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_table(path.read_text()))
    if not sys.argv[1:]:
        print(documented())


if __name__ == "__main__":
    main()
