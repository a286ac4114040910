"""What a step's time is made of."""

from dataclasses import replace

from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2

from nemo_upcycle.config import RECOMPUTE, ParallelFolding
from nemo_upcycle.planner.search import predict
from nemo_upcycle.planner.step_time import step_time
from nemo_upcycle.planner.workload import Mapping
from tests.planning import H100, PAPER, paper_mapping

ONE_GPU_NODES = replace(H100, name="alone", gpus_per_node=1, nvlink_domain=1)


def test_collectives_cost_what_they_cross() -> None:
    """Inside a node they are faster than across; a rack that NVLink joins is a node."""
    node, alone = (step_time(PAPER, paper_mapping(), on) for on in (H100, ONE_GPU_NODES))
    assert node.tensor_parallel < 0.2 * alone.tensor_parallel
    assert node.expert_parallel < 0.2 * alone.expert_parallel
    assert node.matrices == alone.matrices
    wide = paper_mapping(folding=replace(LLAMA3_8B_E8T2.folding, expert_tensor_parallel_size=8))
    racks = replace(H100, nvlink_domain=72)
    rack, node = (step_time(PAPER, wide, on) for on in (racks, H100))
    assert rack.expert_parallel < node.expert_parallel


def test_bubble_shrinks_with_virtual_stages_and_microbatches() -> None:
    def pipeline(vpp: int | None, world_size: int = 128) -> float:
        folding = ParallelFolding.of(tp=2, cp=2, pp=4, vpp=vpp, ep=8)
        time = step_time(PAPER, Mapping(folding, world_size), H100)
        return time.pipeline / time.total

    assert pipeline(None) > pipeline(2) > pipeline(8)
    assert pipeline(8, 512) > pipeline(8, 128)


def test_model_flops_do_not_change_with_the_mapping() -> None:
    """MFU times time times GPUs is the same work, whatever is computed again."""
    work = {
        round(one.mfu * one.time.total * one.mapping.world_size, 6)
        for one in (
            predict(PAPER, paper_mapping(recompute=name, world_size=size), H100)
            for name in RECOMPUTE
            for size in (128, 512)
        )
    }
    assert len(work) == 1
