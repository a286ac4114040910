"""The model that the 8B recipe builds, counted without allocating it."""

from typing import Any

from nemo_upcycle.config import ParallelFolding
from tests.distributed import scenarios
from tests.distributed.pool import RankPool


def count_parameters() -> dict[str, Any]:
    """Build Megatron's model on the meta device and count its parameters by name."""
    import torch
    from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2 as RECIPE

    (model,) = scenarios.build_from(
        RECIPE.architecture,
        ParallelFolding(),
        RECIPE.upcycling,
        init_model_with_meta_device=True,
        # Otherwise Megatron names a device at every allocation, and would fill it.
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.bfloat16,
    )
    parameters = dict(model.named_parameters())
    return {
        "total": sum(p.numel() for p in parameters.values()),
        "experts": sum(p.numel() for n, p in parameters.items() if ".experts." in n),
        "meta": all(p.is_meta for p in parameters.values()),
    }


def test_llama3_8b_e8t2_has_47_49b_parameters_13_67b_active(ranks: RankPool) -> None:
    (count,) = ranks.run(count_parameters, 1)
    assert count["meta"]
    active = count["total"] - count["experts"] * (8 - 2) // 8
    assert round(count["total"] / 1e9, 2) == 47.49
    assert round(active / 1e9, 2) == 13.67
