"""The first steps of a training, in which only the routers learn.

All parameters take part as usual; the gradients of all but the routers' are 0 for these steps, and
nothing decays. Parameters stay bit-identical, and so does Adam's state of them: both moments are 0.
Excluding parameters by `requires_grad` would not do: Megatron's buffers wait for all gradients.
Any training loop can call these functions, with any of Megatron's optimizers.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.names import is_router

LARGEST_STEP = 2.0
"""Limit of the size of the first updates after the warm-up, relative to a new Adam's."""

_STEPS = 1000
"""Steps over which the largest update is looked for; the largest comes after 1 / (1 - beta1)."""


@contextmanager
def only_routers(models: Iterable[torch.nn.Module], optimizer: Any) -> Iterator[None]:
    """Let the optimizer step change the routers alone.

    Args:
        models: The rank's models in Megatron's DistributedDataParallel, with gradients that are
            reduced. Their gradients become 0, except the routers'.
        optimizer: Megatron's optimizer, or NeMo's around it. Inside, no group decays.
    """
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not is_router(name):
                parameter.main_grad.zero_()
    groups = [group for group in optimizer.param_groups if "weight_decay" in group]
    decays = [group["weight_decay"] for group in groups]
    try:
        for group in groups:
            group["weight_decay"] = 0.0
        yield
    finally:
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay


def check_steps(steps: int) -> None:
    """Check the number of steps.

    Raises:
        UpcyclingError: It is less than 1.
    """
    if steps < 1:
        raise UpcyclingError(f"router_warmup_steps is {steps}; expected 1 or more.")


def check_optimizer(config: Any) -> None:
    """Check that the optimizer's first updates after the warm-up are not too large.

    Args:
        config: Megatron's config of the optimizer.

    Raises:
        UpcyclingError: As of `check_betas`; other optimizers than Adam are not checked.
    """
    if config.optimizer == "adam":
        check_betas(config.adam_beta1, config.adam_beta2)


def check_betas(beta1: float, beta2: float) -> None:
    """Check that Adam's first updates after the warm-up are not too large.

    All parameters share one step counter, by which Adam corrects moments that began at 0. After the
    warm-up the counter is high, and moments of frozen parameters begin at 0 uncorrected. With a
    constant gradient the k-th update is (1 - β1^k) / √(1 - β2^k) times a new Adam's.

    Args:
        beta1: Decay of Adam's first moment.
        beta2: Decay of Adam's second moment.

    Raises:
        UpcyclingError: The largest update is more than `LARGEST_STEP` times a new Adam's.
    """
    largest = max((1 - beta1**k) / (1 - beta2**k) ** 0.5 for k in range(1, _STEPS))
    if largest > LARGEST_STEP:
        raise UpcyclingError(
            f"router_warmup_steps with Adam's betas {beta1:g} and {beta2:g}: the first updates "
            f"after the warm-up would be up to {largest:.1f} times too large; expected at most "
            f"{LARGEST_STEP:g}. Use a smaller adam_beta2, such as 0.95, or no warm-up."
        )
