"""What a checkpoint keeps of the optimizer on CPU is what Megatron's own gathering keeps."""

from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.check.models import distributed_optimizer
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from tests.distributed import scenarios
from tests.distributed.pool import RankPool


def differing_states(dense: Path) -> tuple[int, list[str]]:
    """Make a step with random gradients; return how many vectors there are, and which differ."""
    chunks = scenarios.build(dense, ParallelFolding(), UpcyclingConfig(num_moe_experts=2))
    several = {"bucket_size": 20_000, "overlap_grad_reduce": True}
    models, optimizer = distributed_optimizer(chunks, **several)
    assert all(len(model.buffers[0].buckets) > 1 for model in models)
    torch.manual_seed(1)
    for model in models:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            buffer.grad_data.normal_()
    optimizer.step()
    count, differing = 0, []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        ours = part.get_parameter_state_dp_zero()
        gather: Any = type(part).get_parameter_state_dp_zero
        theirs = gather.__wrapped__(part)
        assert ours.keys() == theirs.keys()
        for number in ours.keys() - {"buckets_coalesced"}:
            for dtype, vectors in theirs[number].items():
                for key, expected in vectors.items():
                    found = ours[number][dtype][key]
                    same = torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
                    count += 1
                    differing += [] if same else [f"{number} {key}"]
    return count, differing


def test_the_state_of_one_rank_is_what_megatron_gathers(ranks: RankPool, dense: Path) -> None:
    ((count, differing),) = ranks.run(differing_states, 1, dense=dense)
    assert count >= 8
    assert differing == []
