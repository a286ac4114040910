"""ParallelFolding."""

import pytest

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError


def test_paper_folding_on_512_gpus() -> None:
    """arXiv 2412.09952: TP2 CP2 PP4, EP8 ETP1 on 512 GPUs; DP = W/(TP·CP·PP)."""
    folding = ParallelFolding(
        tensor_model_parallel_size=2,
        context_parallel_size=2,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=8,
        expert_model_parallel_size=8,
    )
    folding.validate(512, 8)
    assert folding.data_parallel_size(512) == 32
    assert folding.expert_data_parallel_size(512) == 16
    assert folding.sequence_parallel


@pytest.mark.parametrize(
    ("values", "world_size", "experts", "message"),
    [
        ({"tensor_model_parallel_size": 3}, 8, 8, "TP·CP·PP = 3"),
        ({"expert_model_parallel_size": 8}, 4, 8, "ETP·EP·PP = 8"),
        ({"expert_model_parallel_size": 4}, 8, 6, "6 experts do not divide"),
    ],
)
def test_folding_must_divide(values: dict, world_size: int, experts: int, message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        ParallelFolding(**values).validate(world_size, experts)


def test_sizes_are_positive_and_virtual_stages_need_stages() -> None:
    with pytest.raises(UpcyclingError, match="1 or more"):
        ParallelFolding(expert_model_parallel_size=0)
    with pytest.raises(UpcyclingError, match="need pipeline stages"):
        ParallelFolding(virtual_pipeline_model_parallel_size=2)
