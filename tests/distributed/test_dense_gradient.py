"""A router's dense gradient is DenseMixer's, under any mapping; all else is that of top-k."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import scenarios
from tests.distributed.foldings import FOLDINGS
from tests.distributed.pool import RankPool
from tests.distributed.whole import whole
from tests.tiny import tokens

IDS = tokens(rows=4, length=33)
SIGMOID = {"moe_router_score_function": "sigmoid"}
KINDS: dict[str, dict[str, Any]] = {
    "top-k first": {},
    "softmax first": {"moe_router_pre_softmax": True},
    "sigmoid, expert bias": SIGMOID | {"moe_router_enable_expert_bias": True},
    "sigmoid, one expert": SIGMOID | {"moe_router_topk": 1},
}
LAST = "decoder.layers.3.mlp."


def stepped(dense: Path, folding: ParallelFolding, **options: Any) -> tuple[Any, Any]:
    """Run one step; return this rank's part of the loss, and its gradients."""
    from nemo_upcycle.check.models import gradients, make_experts_differ

    chunks = scenarios.upcycled(dense, folding, UpcyclingConfig(**options))
    make_experts_differ(chunks)
    loss, _ = scenarios._step(chunks, IDS)
    return loss, gradients(chunks)


def together(results: list[tuple[Any, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean loss, and whole gradients."""
    total, count = sum(loss for loss, _ in results)
    return float(total / count), whole(shard for _, found in results for shard in found)


def one_rank(ranks: RankPool, dense: Path, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    return together(ranks.run(stepped, 1, dense=dense, folding=ParallelFolding(), **options))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ["TP2-EP2-ETP1", "CP2-EP2", "ETP2", "PP2-VPP2-TP2-EP2-ETP1"])
def test_any_mapping_has_the_same_gradients(ranks: RankPool, dense: Path, name: str) -> None:
    mapping = FOLDINGS[name]
    options = {"router_dense_gradient": True, "router_logit_normalization": 1.0}
    loss, expected = one_rank(ranks, dense, **options)
    found_loss, found = together(
        ranks.run(stepped, mapping.world_size, dense=dense, folding=mapping.folding, **options)
    )
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for parameter, values in expected.items():
        assert difference(found[parameter], values) < 1e-5, parameter


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_all_but_the_routers_learns_as_from_top_k(
    ranks: RankPool, dense: Path, dispatcher: str
) -> None:
    """The last layer alone: the gradients of layers before contain its router's."""
    options = {"moe_token_dispatcher_type": dispatcher}
    loss, usual = one_rank(ranks, dense, **options)
    dense_loss, found = one_rank(ranks, dense, router_dense_gradient=True, **options)
    assert dense_loss == pytest.approx(loss, rel=1e-6)
    experts = [name for name in usual if name.startswith(LAST + "experts.")]
    assert len(experts) == 16
    for name in [*experts, "output_layer.weight"]:
        assert difference(found[name], usual[name]) < 1e-5, name
    assert difference(found[LAST + "router.weight"], usual[LAST + "router.weight"]) > 0.1


def router_gradients(dense: Path, folding: ParallelFolding, **options: Any) -> torch.Tensor:
    """Return the gradient of a layer's router, and what autograd makes of DenseMixer's formula."""
    from nemo_upcycle.check.models import make_experts_differ

    upcycling = UpcyclingConfig(router_dense_gradient=True, **options)
    chunks = scenarios.upcycled(dense, folding, upcycling)
    make_experts_differ(chunks)
    layer = chunks[0].decoder.layers[1].mlp
    generator = torch.Generator().manual_seed(0)
    states, target = torch.randn(2, 24, 1, 64, generator=generator)
    output, _ = layer(states)
    (output * target).sum().backward()
    found = layer.router.weight.grad.clone()
    x_TH, weight = states.flatten(0, 1), layer.router.weight.detach().clone().requires_grad_()
    logits_TE = x_TH @ weight.T
    outputs_TEH = torch.stack([expert(x_TH)[0] for expert in layer.experts.local_experts], 1)
    sigmoid = upcycling.moe_router_score_function == "sigmoid"
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    chosen_TE = torch.zeros_like(scores_TE)
    chosen_TE.scatter_(1, scores_TE.topk(upcycling.moe_router_topk).indices, 1)
    total_T1 = (scores_TE * chosen_TE).sum(-1, keepdim=True)
    if upcycling.moe_router_pre_softmax or upcycling.moe_router_topk == 1:
        total_T1 = torch.ones_like(total_T1)
    weights_TE = scores_TE * chosen_TE / total_T1 + scores_TE * (1 - chosen_TE) / total_T1.detach()
    dense_TH = (weights_TE[..., None] * outputs_TEH.detach()).sum(1)
    (dense_TH * target.flatten(0, 1)).sum().backward()
    return torch.stack((found, weight.grad))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_densemixers(ranks: RankPool, dense: Path, kind: str) -> None:
    """Its code: of top-k weights over their sum, and of the others over the same as a constant."""
    folding = ParallelFolding()
    ((found, expected),) = ranks.run(
        router_gradients, 1, dense=dense, folding=folding, **KINDS[kind]
    )
    assert difference(found, expected) < 1e-5
