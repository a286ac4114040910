"""What all ranks of a job read."""

from nemo_upcycle.checkpoint import TensorInfo
from nemo_upcycle.checkpoint.described import dense_of_config
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.plans.job import distinct_bytes, plan_job
from nemo_upcycle.plans.rank import Block
from tests.tiny import CONFIG


def test_a_node_reads_what_its_ranks_share_once() -> None:
    dense = dense_of_config({**CONFIG, "model_type": "llama", "torch_dtype": "float32"}, "", "")
    folding = ParallelFolding(expert_model_parallel_size=4)
    together = plan_job(dense, UpcyclingConfig(), folding, 1, 4)
    assert together.bytes_to_read == 4 * dense.bytes
    assert together.bytes_of_nodes == (dense.bytes,)
    apart = plan_job(dense, UpcyclingConfig(), folding, 4, 1)
    assert apart.bytes_of_nodes == (dense.bytes,) * 4


def test_overlapping_blocks_count_once() -> None:
    tensors = {"a": TensorInfo((10, 10), "BF16"), "b": TensorInfo((7,), "F32")}
    blocks = [
        Block("a", (0, 6), (0, 10)),
        Block("a", (4, 8), (5, 10)),
        Block("a", (4, 8), (5, 10)),
        Block("a", (9, 10), (0, 1)),
        Block("b", (2, 5), None),
        Block("b", (3, 7), None),
    ]
    assert distinct_bytes(blocks, tensors) == 2 * (60 + 10 + 1) + 4 * 5
