"""What the planner expects of a recipe."""

from nemo_upcycle_recipes.recipe import Recipe

from nemo_upcycle.families import Architecture
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.search import Prediction, predict
from nemo_upcycle.planner.workload import Mapping, Workload


def workload(recipe: Recipe, arch: Architecture | None = None) -> Workload:
    """Return what a recipe trains: its own dense model, or another."""
    schedule = recipe.schedule
    return Workload(
        arch or recipe.architecture,
        recipe.upcycling,
        schedule.seq_length,
        schedule.global_batch_size,
        recipe.precision,
    )


def mapping(recipe: Recipe) -> Mapping:
    """Return how a recipe trains it."""
    batch = recipe.schedule.micro_batch_size
    return Mapping(recipe.folding, recipe.world_size, batch, recipe.recompute)


def expected(recipe: Recipe, hardware: Hardware) -> Prediction:
    """Predict memory and step time of a recipe as it is.

    Args:
        recipe: The recipe.
        hardware: On what.

    Raises:
        UpcyclingError: The model cannot be spread so, or the batch does not divide.
    """
    return predict(workload(recipe), mapping(recipe), hardware)


def summary(prediction: Prediction) -> str:
    """Say in a line what a prediction comes to."""
    gpus, hardware = prediction.mapping.world_size, prediction.hardware
    return (
        f"On {gpus} {hardware.name}: {prediction.memory.total / 2**30:.0f} GiB a GPU, "
        f"{prediction.time.total:.2g} s a step, {prediction.mfu:.0%} MFU (predicted)."
    )
