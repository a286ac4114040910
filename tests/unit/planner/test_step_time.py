"""What a step's time is made of."""

from dataclasses import replace

from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2

from nemo_upcycle.config import RECOMPUTE, ParallelFolding
from nemo_upcycle.planner.efficiency import CALIBRATED
from nemo_upcycle.planner.hardware import Hardware
from nemo_upcycle.planner.machine import distinct
from nemo_upcycle.planner.search import predict
from nemo_upcycle.planner.step_time import step_time
from nemo_upcycle.planner.workload import Mapping, Workload
from tests.planning import H100, PAPER, QUICK_HOST, paper_mapping

ONE_GPU_NODES = replace(H100, name="alone", gpus_per_node=1, nvlink_domain=1)


def test_collectives_cost_what_they_cross() -> None:
    """Collectives are faster inside a node than across; a rack that NVLink joins is a node."""
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


def test_sending_between_stages_is_hidden_only_as_far_as_computing_takes() -> None:
    """With virtual stages a fast network costs next to nothing, a slow one shows."""
    folding = ParallelFolding.of(tp=2, cp=2, pp=4, vpp=8, ep=8)

    def pipeline(bandwidth: float) -> float:
        network = replace(H100, network_bandwidth=bandwidth)
        return step_time(PAPER, Mapping(folding, 128), network).pipeline

    fast, slow, slower, slowest = map(pipeline, (50, 1, 0.1, 0.01))
    assert fast < slow < slower < slowest
    assert slowest > 5 * slower


def test_a_narrow_layer_takes_as_long_as_its_host() -> None:
    """However little there is to compute; DeepEP and padding spare the host a wait."""
    tiny = replace(PAPER.arch, hidden_size=256, ffn_hidden_size=512, num_attention_heads=2)
    narrow = replace(PAPER, arch=replace(tiny, num_query_groups=2, kv_channels=128))

    def host(on: Hardware = H100, workload: Workload = narrow) -> float:
        return step_time(workload, Mapping(ParallelFolding(), 8), on).host

    flex = replace(narrow, upcycling=replace(PAPER.upcycling, moe_token_dispatcher_type="flex"))
    assert host(workload=PAPER) == 0
    assert 0 < host(workload=flex) < host()
    assert host(replace(H100, host_slowness=2.0)) > 2 * host()


def test_a_dispatcher_that_deduplicates_sends_less() -> None:
    """With 8 experts per token on 4 nodes, a token goes to each node once."""
    narrow = replace(PAPER.upcycling, num_moe_experts=64, granularity=8, moe_router_topk=8)
    mapping = Mapping(ParallelFolding.of(ep=32), 128)

    def sending(dispatcher: str, ep: int = 32) -> float:
        upcycling = replace(narrow, moe_token_dispatcher_type=dispatcher)
        on = replace(mapping, folding=ParallelFolding.of(ep=ep))
        return step_time(replace(PAPER, upcycling=upcycling), on, H100).expert_parallel

    assert sending("flex") < 0.5 * sending("alltoall")
    assert sending("flex", ep=1) == sending("allgather", ep=1) == 0


def test_distinct_places() -> None:
    assert distinct(1, 8) == 1
    assert distinct(4, 1) == 1
    assert distinct(2, 2) == 1.5


def test_uneven_routing_is_a_cost_of_its_own() -> None:
    """Only experts on several ranks pay for the fullest; a capacity bounds what is paid."""
    paper = replace(PAPER, upcycling=replace(PAPER.upcycling, moe_expert_capacity_factor=None))
    mapping = paper_mapping()
    even = step_time(paper, mapping, QUICK_HOST, CALIBRATED.even)
    real = step_time(paper, mapping, QUICK_HOST)
    assert real.total > even.total
    assert real.attention == even.attention
    assert real.tensor_parallel == even.tensor_parallel
    one_rank = paper_mapping(folding=replace(mapping.folding, expert_model_parallel_size=1))
    same = (
        step_time(paper, one_rank, QUICK_HOST),
        step_time(paper, one_rank, QUICK_HOST, CALIBRATED.even),
    )
    assert same[0] == same[1]
    capped = replace(paper, upcycling=replace(paper.upcycling, moe_expert_capacity_factor=1.0))
    assert step_time(capped, mapping, QUICK_HOST) == step_time(
        capped, mapping, QUICK_HOST, CALIBRATED.even
    )


def test_dropped_work_is_not_counted_as_done() -> None:
    """A capacity below 1 never shows more than matrix products reach."""
    for capacity in (1.0, 0.5, 0.1):
        upcycling = replace(PAPER.upcycling, moe_expert_capacity_factor=capacity)
        one = predict(replace(PAPER, upcycling=upcycling), paper_mapping(), H100)
        assert one.mfu < CALIBRATED.gemm
