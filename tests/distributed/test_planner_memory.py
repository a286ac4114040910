"""Predicted bytes of parameters, gradients and optimizer state are those of real models.

And as many microbatches are in flight as Megatron's schedules say.
"""

from typing import Any

import pytest

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.families import Architecture
from nemo_upcycle.planner.memory import ModelState, model_state, of_stage
from nemo_upcycle.planner.workload import Mapping, Workload
from nemo_upcycle.plans.layout import coordinates
from tests.distributed.foldings import spread
from tests.distributed.pool import RankPool
from tests.tiny import wide_architecture

CLOSE = 0.01

E8T2 = UpcyclingConfig()
MODELS = {
    "E8T2": E8T2,
    "dense": UpcyclingConfig(num_moe_experts=None),
    "granular": UpcyclingConfig(num_moe_experts=8, granularity=2, moe_router_topk=4),
    "part shared, expert bias": UpcyclingConfig(
        moe_shared_expert_intermediate_size=0.5,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
    ),
    "partly dense, shared": UpcyclingConfig(moe_layer_freq=(0, 1, 1, 0), moe_shared_expert=True),
}
CASES = [
    (spread(1), "E8T2"),
    (spread(1), "dense"),
    (spread(1, dense="tied"), "E8T2"),
    (spread(2), "E8T2"),
    (spread(2, ep=2), "E8T2"),
    (spread(2, etp=2), "E8T2"),
    (spread(2, tp=2), "E8T2"),
    (spread(2, cp=2), "E8T2"),
    (spread(2, pp=2, vpp=2), "E8T2"),
    (spread(2, pp=2, dense="tied"), "E8T2"),
    (spread(2, pp=2, num_layers_in_first_pipeline_stage=1), "E8T2"),
    (spread(2, pp=2), "partly dense, shared"),
    (spread(2, ep=2), "partly dense, shared"),
    (spread(2, ep=2), "part shared, expert bias"),
    (spread(2), "dense"),
    (spread(4), "dense"),
    (spread(4, tp=2), "dense"),
    (spread(4), "E8T2"),
    (spread(4), "granular"),
    (spread(4, ep=2), "granular"),
    (spread(4, tp=2, pp=2, vpp=2, ep=2), "E8T2"),
    (spread(4, tp=2, ep=2, etp=2), "E8T2"),
    (spread(4, cp=2, ep=4), "E8T2"),
    (spread(4, tp=2, cp=2, etp=2), "E8T2"),
    (spread(4, pp=2, cp=2, ep=2), "partly dense, shared"),
]


def state_bytes(
    arch: Architecture, folding: ParallelFolding, upcycling: UpcyclingConfig, precision: str
) -> tuple[int, int, int]:
    """Build a model with Megatron's DDP and distributed optimizer, make a step, and weigh it."""
    import torch

    from nemo_upcycle.check.models import distributed_optimizer
    from tests.distributed import scenarios

    bf16 = precision == "bf16-mixed"
    dtype = torch.bfloat16 if bf16 else torch.float32
    chunks = scenarios.build_from(
        arch, folding, upcycling, params_dtype=dtype, pipeline_dtype=dtype, bf16=bf16
    )
    if bf16:
        chunks = [chunk.bfloat16() for chunk in chunks]
    models, optimizer = distributed_optimizer(chunks, bf16)
    for model in models:
        model.zero_grad_buffer()
    optimizer.step()
    buffers = [b for m in models for b in (*m.buffers, *m.expert_parallel_buffers)]
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    kept: dict[int, int] = {}
    for part in parts:
        if bf16:
            main = [p for group in part.shard_fp32_from_float16_groups for p in group]
            kept |= {id(p): p.numel() * p.element_size() for p in main if p is not None}
        for state in part.optimizer.state.values():
            moments = (state["exp_avg"], state["exp_avg_sq"])
            kept |= {id(m): m.numel() * m.element_size() for m in moments}
    return (
        sum(b.param_data.numel() * b.param_data.element_size() for b in buffers),
        sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        sum(kept.values()),
    )


ALL = [(*case, "bf16-mixed") for case in CASES] + [(*case, "32") for case in CASES[-8::2]]
EVERY = [
    # A third belongs to every change, the whole grid to `make test-all`.
    pytest.param(
        *case,
        id=f"{case[0].world_size}: {case[0].folding}, {case[0].dense}, {', '.join(case[1:])}",
        marks=[] if number % 3 == 1 else pytest.mark.slow,
    )
    for number, case in enumerate(ALL)
]


@pytest.mark.parametrize(("spread_", "model", "precision"), EVERY)
def test_predicted_bytes_are_real(
    ranks: RankPool, spread_: Any, model: str, precision: str
) -> None:
    folding, world_size = spread_.folding, spread_.world_size
    arch = wide_architecture(tie_word_embeddings=spread_.dense == "tied")
    options = {"arch": arch, "folding": folding, "upcycling": MODELS[model], "precision": precision}
    measured = [ModelState(*each) for each in ranks.run(state_bytes, world_size, **options)]
    workload = Workload(arch, MODELS[model], 32, 4, precision)
    mapping = Mapping(folding, world_size)
    for rank, found in enumerate(measured):
        stage = coordinates(folding, world_size, rank).pp
        said = model_state(workload, mapping, stage)
        assert said.parameters == found.parameters
        assert said.gradients == found.gradients
        assert said.optimizer == pytest.approx(found.optimizer, rel=CLOSE)


@pytest.mark.parametrize("spread_", [spread(1), spread(2, ep=2), spread(4)])
def test_padding_is_megatrons(ranks: RankPool, spread_: Any) -> None:
    """Sizes that are no multiples of 64 or 128 are padded: parameters, and what ranks share."""
    arch = wide_architecture(hidden_size=80, intermediate_size=72)
    options = {"arch": arch, "folding": spread_.folding, "upcycling": E8T2, "precision": "32"}
    workload = Workload(arch, E8T2, 32, 4, "32")
    said = model_state(workload, Mapping(spread_.folding, spread_.world_size), stage=0)
    for parameters, gradients, _ in ranks.run(state_bytes, spread_.world_size, **options):
        assert (said.parameters, said.gradients) == (parameters, gradients)
    assert said.parameters > 4 * sum(b.elements for b in workload.buffers(spread_.folding, 0))


def flying(folding: ParallelFolding, microbatches: int) -> float:
    """Return the microbatches that are kept before this rank's first backward, by Megatron."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    stages = folding.pipeline_model_parallel_size
    virtual = folding.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=virtual
    )
    total, _, warm_up, _ = get_pp_rank_microbatches(microbatches, virtual or 1, stages)
    parallel_state.destroy_model_parallel()
    # Then forward and backward take turns: one more is kept.
    return min(total, warm_up + 1) / (virtual or 1)


@pytest.mark.parametrize("microbatches", [4, 8, 32])
@pytest.mark.parametrize("vpp", [None, 2, 4])
def test_as_many_microbatches_fly_as_megatron_lets(
    ranks: RankPool, vpp: int | None, microbatches: int
) -> None:
    arch = wide_architecture(num_hidden_layers=16)
    folding = ParallelFolding.of(pp=4, vpp=vpp)
    said = ranks.run(flying, 4, folding=folding, microbatches=microbatches)
    workload = Workload(arch, E8T2, 32, microbatches)
    mapping = Mapping(folding, 4, recompute="full")
    layer = 32 * arch.hidden_size * 2  # its input, bf16
    for stage, count in enumerate(said):
        assert of_stage(workload, mapping, stage).activations == count * 4 * layer
