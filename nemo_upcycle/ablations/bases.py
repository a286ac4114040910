"""The models that comparisons are made with: the demo's tiny Llama, or a recipe and its control."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_upcycle_recipes.arguments import parse
from nemo_upcycle_recipes.numbers import LLAMA_TINY, LLAMA_TINY_E8T2, RECIPES, recipe_named
from nemo_upcycle_recipes.recipe import Recipe

from nemo_upcycle.errors import UpcyclingError

BATCH = {"global_batch_size": 8}
"""Half of the demo's batch size, for twice the updates at equal tokens.

With this batch size the baseline learns more from 205k tokens (held-out loss 4.646, against 4.670
nats; one seed). With a quarter, over 102k tokens, the loss ends higher than at the start (4.822,
from 4.768).
"""


@dataclass(frozen=True)
class Base:
    """The model that a comparison is made with.

    Attributes:
        upcycled: Recipe of the baseline.
        dense: Recipe of the dense model trained further.
        numbers: Arguments of the recipes in all trainings.
        trained_by_dense: Whether `dense` is also the recipe of the dense checkpoint's own training,
            whose FLOPs are known then.
        accelerator: `cpu` or `gpu`.
        rows: Rows per corpus for the held-out loss.
        rows_at_once: Rows per forward pass.
    """

    upcycled: Recipe
    dense: Recipe
    numbers: Mapping[str, Any] = field(default_factory=dict)
    trained_by_dense: bool = False
    accelerator: str = "cpu"
    rows: int = 100
    rows_at_once: int = 20

    @property
    def is_tiny(self) -> bool:
        """Whether this is the demo's model."""
        return self.upcycled.name == LLAMA_TINY_E8T2.name

    @property
    def start_method(self) -> str:
        """How processes of trainings start; CUDA does not survive a fork."""
        return "spawn" if self.accelerator == "gpu" else "fork"

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return self.dense.schedule.lr

    @property
    def minimum(self) -> float:
        """The learning rate at the end."""
        return self.dense.schedule.min_lr


TINY = Base(LLAMA_TINY_E8T2, LLAMA_TINY, BATCH, trained_by_dense=True)
"""The demo's model, on CPU. Two corpora have 51,200 held-out tokens in total."""


def base_of(name: str, accelerator: str = "gpu", settings: Iterable[str] = ()) -> Base:
    """Return a recipe and its control as the model of a comparison.

    Args:
        name: Name of an upcycled recipe with a control, such as `smollm2_135m_e8t2`.
        accelerator: `cpu` or `gpu`.
        settings: `KEY=VALUE` arguments of both recipes.

    Raises:
        UpcyclingError: There is no such recipe, the recipe has no control, or an argument is wrong.
    """
    if accelerator not in ("cpu", "gpu"):
        raise UpcyclingError(f"accelerator is {accelerator!r}; expected 'cpu' or 'gpu'.")
    if name == LLAMA_TINY_E8T2.name:
        if accelerator != "cpu" or list(settings):
            raise UpcyclingError(
                f"{name} is compared on CPU, with the demo's numbers; expected no --accelerator "
                "and no --set beside it."
            )
        return TINY
    upcycled = recipe_named(name)
    control = RECIPES.get(f"{upcycled.dense}_dense")
    if upcycled.upcycling.num_moe_experts is None or control is None:
        fit = [each for each in RECIPES if f"{RECIPES[each].dense}_dense" in RECIPES]
        fit = [each for each in fit if RECIPES[each].upcycling.num_moe_experts is not None]
        raise UpcyclingError(
            f"{name} is no upcycled recipe with a control; expected one of: "
            f"{', '.join([LLAMA_TINY_E8T2.name, *fit])}."
        )
    # Rows of the largest logits take as much memory as in a training's microbatch.
    at_once = max(1, upcycled.schedule.micro_batch_size // 2)
    return Base(
        upcycled, control, parse(control, settings), accelerator=accelerator, rows_at_once=at_once
    )
