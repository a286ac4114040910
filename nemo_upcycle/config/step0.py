"""Whether an upcycled model computes the dense function at step 0, and the factors for that."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_upcycle.config.upcycling import UpcyclingConfig


@dataclass(frozen=True)
class Exactness:
    """Whether the upcycled model computes the dense model's function at step 0, and why."""

    exact: bool
    reason: str

    def __str__(self) -> str:
        return f"{'exact' if self.exact else 'not exact'}: {self.reason}"


@dataclass(frozen=True)
class Scales:
    """Factors of an expert's weights, and of a shared expert's down projection."""

    gate: float = 1.0
    up: float = 1.0
    down: float = 1.0
    shared_down: float = 1.0


REARRANGING = ("copy", "activation_sorted")
"""Initializers whose experts are neurons of the dense layer, all of them in each copy."""


def scales(config: "UpcyclingConfig", gated: bool) -> Scales:
    """Return the factors of an expert's weights.

    The routed output is smaller than the dense output by a factor, the base. With top-k first, and
    with sigmoid, the base is G, because the weights sum to 1 over T/G copies of each shard. With
    softmax first the base is about E·G²/T, because each weight is about 1/(E·G).

    `exact` makes the output larger by the base. A gated neuron is linear in up and in down,
    so up and down get √base each. A squared-ReLU neuron is quadratic in up, so both get ∛base.
    With the whole layer as a shared expert, routed and shared output are both halved in down. A
    shared part and the routed rest are disjoint, so that neither is halved. `paper` multiplies
    gate, up and down of routed experts by ∛base, as Megatron-Core does, which changes a gated
    neuron's function.

    Args:
        config: The upcycling.
        gated: Whether a neuron has a gate; squared ReLU otherwise.

    Source: arXiv 2410.07524 Eq. 2.
    """
    base = float(config.granularity)
    if config.moe_router_pre_softmax:
        base *= config.expansion_rate * config.granularity / config.moe_router_topk
    if config.scaling == "none":
        return Scales()
    if config.scaling == "paper":
        factor = base ** (1 / 3)
        return Scales(gate=factor, up=factor, down=factor)
    factor = base ** (1 / 2 if gated else 1 / 3)
    half = 0.5 if config.moe_shared_expert else 1.0
    return Scales(up=factor, down=half * factor, shared_down=half)


def exactness(config: "UpcyclingConfig", gated: bool, dense_checkpoints: int) -> Exactness:
    """Return whether the upcycled model computes the dense model's function at step 0.

    Args:
        config: The upcycling.
        gated: Whether a neuron has a gate; squared ReLU otherwise.
        dense_checkpoints: Number of dense models that the experts come from.
    """
    if config.num_moe_experts is None:
        return Exactness(True, "every layer is the dense layer")
    problems = [*_inexact_weights(config, gated, dense_checkpoints), *_inexact_routing(config)]
    if problems:
        return Exactness(False, "; ".join(problems))
    whole = "the dense layer"
    if config.moe_shared_expert_intermediate_size is not None:
        whole = "the part of the dense layer that the shared expert leaves"
    if config.granularity == 1:
        return Exactness(True, f"experts are {whole} and their weights sum to 1")
    return Exactness(True, f"a token's experts make up whole copies of {whole}")


def _inexact_weights(
    config: "UpcyclingConfig", gated: bool, dense_checkpoints: int
) -> Iterator[str]:
    if dense_checkpoints > 1:
        yield (
            f"experts come from {dense_checkpoints} dense models, and all other weights are "
            "averages"
        )
    if config.initializer.partition("(")[0].strip() not in REARRANGING:
        yield f"the initializer {config.initializer} makes experts unlike the dense layer"
    if config.moe_shared_expert and config.scaling != "exact":
        yield (
            "the shared expert and the routed ones add up to twice the feed-forward output "
            "(weight_scaling='exact' halves both)"
        )
    if config.granularity > 1 and not config.moe_router_pre_softmax:
        if config.scaling == "none":
            part = (
                "feed-forward" if config.moe_shared_expert_intermediate_size is None else "routed"
            )
            yield f"the {part} output is divided by granularity {config.granularity}"
        elif config.scaling == "paper" and gated:
            yield (
                "cube-root scaling changes what a gated neuron computes "
                "(weight_scaling='exact' does not)"
            )


def _inexact_routing(config: "UpcyclingConfig") -> Iterator[str]:
    experts, topk, granularity = (
        config.num_moe_experts or 0,
        config.moe_router_topk,
        config.granularity,
    )
    if config.moe_router_score_function == "sigmoid" and topk == 1:
        yield (
            "Megatron-Core does not normalize the sigmoid score of a single expert, so "
            "the routed output is scaled by a factor from 0 to 1 (use moe_router_topk=2 or more)"
        )
    if config.moe_router_pre_softmax and config.scaling == "none":
        yield (
            "softmax before top-k weights the chosen experts by less than 1 in total, so "
            f"feed-forward outputs are scaled by a factor from {topk}/{experts} to 1 "
            "(set moe_router_pre_softmax=False for an exact start)"
        )
    elif config.moe_router_pre_softmax:
        yield (
            "softmax before top-k weights experts unevenly, which a fixed scaling makes up "
            "for only on average (set moe_router_pre_softmax=False for an exact start)"
        )
    if granularity > 1 and not config.routes_copies:
        yield (
            f"a {config.router} router picks {topk} of {experts} experts without regard to the "
            f"{granularity} shards of the layer that they hold"
        )
    elif topk % granularity:
        yield (
            f"{topk} experts per token do not make up whole copies of {granularity} shards "
            f"(use a multiple of {granularity})"
        )
    if config.can_drop_tokens:
        yield (
            f"capacity factor {config.moe_expert_capacity_factor:g} drops tokens beyond an "
            f"expert's capacity: if all tokens pick the same experts, "
            f"{config.dropped_at_worst:.0%} of the assignments (at {experts / topk:g} and "
            "above, or with None, none is dropped)"
        )
