"""Scores, normalized logits and the bias of experts are what the papers' formulas say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import scenarios
from tests.distributed.pool import RankPool
from tests.tiny import tokens

IDS = tokens(rows=2, length=33)
RATE = 0.05
NORMALIZATION = 1.5
TOPK = 2


def routed(dense: Path, folding: ParallelFolding) -> list[dict[str, np.ndarray]]:
    """Run a step with biases that are not 0; return what each router has seen and made of it."""
    import torch
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.utils import get_model_config

    from nemo_upcycle.check.models import distributed_optimizer, train_step

    upcycling = UpcyclingConfig(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=RATE,
        moe_router_load_balancing_type="none",
        router_logit_normalization=NORMALIZATION,
    )
    chunks = scenarios.upcycled(dense, folding, upcycling)
    models, _ = distributed_optimizer(chunks)
    get_model_config(chunks[0]).finalize_model_grads_func = finalize_model_grads
    routers = [module for module in chunks[0].modules() if isinstance(module, TopKRouter)]
    found: list[dict[str, Any]] = [{"plain": [], "logits": [], "probs": []} for _ in routers]
    for seed, (router, seen) in enumerate(zip(routers, found, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        router.expert_bias.normal_(0, 0.2, generator=generator)
        seen["before"] = router.expert_bias.numpy().copy()

        def watch(module: Any, inputs: Any, outputs: Any, seen: dict = seen) -> None:
            seen["plain"].append((inputs[0] @ module.weight.T).detach().flatten(0, 1))
            seen["logits"].append(module.gating(inputs[0]).detach().flatten(0, 1))
            seen["probs"].append(outputs[0].detach())

        router.register_forward_hook(watch)
    train_step(models, IDS)
    for router, seen in zip(routers, found, strict=True):
        seen["after"] = router.expert_bias.numpy().copy()
        names = ("plain", "logits", "probs")
        seen |= {name: torch.cat(seen[name]).double().numpy() for name in names}
    return found


@pytest.fixture(scope="module")
def found(ranks: RankPool, dense: Path) -> list[dict[str, np.ndarray]]:
    return ranks.run(routed, 1, dense=dense, folding=ParallelFolding())[0]


def test_logits_are_normalized_over_experts(found: list[dict[str, np.ndarray]]) -> None:
    """Skywork-MoE, arXiv 2406.06563 Eq. 6: λ · (z - μ) / σ."""
    for seen in found:
        z = seen["plain"]
        expected = NORMALIZATION * (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
        np.testing.assert_allclose(seen["logits"], expected, atol=1e-4)


def chosen(seen: dict[str, np.ndarray]) -> np.ndarray:
    """Return which experts each token visits: top-k of score and bias, [tokens, experts]."""
    scores = 1 / (1 + np.exp(-seen["logits"]))
    compared = scores + seen["before"]
    return compared >= np.sort(compared, axis=1)[:, [-TOPK]]


def test_weights_are_chosen_scores_over_their_sum(found: list[dict[str, np.ndarray]]) -> None:
    """DeepSeek-V3, arXiv 2412.19437 Eqs. 13, 15 and 16: the bias decides the choice alone."""
    assert len(found) == 4
    for seen in found:
        scores = chosen(seen) / (1 + np.exp(-seen["logits"]))
        expected = scores / scores.sum(1, keepdims=True)
        np.testing.assert_allclose(seen["probs"], expected, atol=1e-6)
        np.testing.assert_allclose(seen["probs"].sum(1), 1, atol=1e-6)


def test_a_step_moves_biases_towards_the_mean_load(found: list[dict[str, np.ndarray]]) -> None:
    """Algorithm 1 of arXiv 2408.15664: b ← b + u · sign(mean load - load)."""
    for seen in found:
        load = chosen(seen).sum(0)
        expected = seen["before"] + RATE * np.sign(load.mean() - load)
        np.testing.assert_allclose(seen["after"], expected, atol=1e-6)
        assert np.any(seen["after"] != seen["before"])
