"""Weights equal those of Megatron-Core's own `upcycle_state_dict`, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.engine import load
from tests.distributed import scenarios
from tests.distributed.pool import RankPool
from tests.tiny import write_dense

CASES: dict[str, dict[str, Any]] = {
    "copy, G1": {},
    "paper, G2": {"num_moe_experts": 16, "granularity": 2, "weight_scaling": "paper"},
    "paper, G4": {
        "num_moe_experts": 16,
        "granularity": 4,
        "moe_router_topk": 4,
        "weight_scaling": "paper",
    },
    "paper, G1, softmax first": {"moe_router_pre_softmax": True, "weight_scaling": "paper"},
    "paper, G4, softmax first": {
        "num_moe_experts": 32,
        "granularity": 4,
        "moe_router_topk": 8,
        "moe_router_pre_softmax": True,
        "weight_scaling": "paper",
    },
}


def compare(
    dense: Path, folding: ParallelFolding, upcycling: UpcyclingConfig, bf16: bool
) -> dict[str, list[str]]:
    """Return the names of parameters that Megatron makes otherwise, and of all compared."""
    from megatron.core.transformer.moe.upcycling_utils import upcycle_state_dict

    control = UpcyclingConfig(num_moe_experts=None)
    dtype = {"params_dtype": torch.bfloat16, "bf16": True} if bf16 else {}
    if bf16:
        dtype["pipeline_dtype"] = torch.bfloat16
    checkpoint = open_branches(str(dense))
    dense_model = scenarios.build(dense, ParallelFolding(), control, **dtype)
    load.fill(dense_model, checkpoint, control)
    ours = scenarios.build(dense, folding, upcycling, **dtype)
    theirs = upcycle_state_dict(ours, dense_model)["model"]
    load.fill(ours, checkpoint, upcycling)
    parameters = dict(ours[0].named_parameters())
    compared = [name for name in parameters if "router" not in name]
    different = [name for name in compared if not torch.equal(parameters[name], theirs[name])]
    groups = [
        name
        for name, values in parameters.items()
        if "router" in name and not torch.equal(same_rows(values), same_rows(theirs[name]))
    ]
    return {"different": different, "compared": compared, "routers of other groups": groups}


def same_rows(values: torch.Tensor) -> torch.Tensor:
    """Say of every two rows whether they are equal."""
    return (values[:, None] == values[None]).all(dim=-1)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_weights_equal_megatrons(
    ranks: RankPool, tmp_path: Path, family: str, name: str, bf16: bool
) -> None:
    dense = write_dense(tmp_path, family)
    (found,) = ranks.run(
        compare,
        1,
        dense=dense,
        folding=ParallelFolding(),
        upcycling=UpcyclingConfig(**CASES[name]),
        bf16=bf16,
    )
    assert len([n for n in found["compared"] if ".experts." in n]) >= 4 * 2 * 8
    assert found["different"] == []
    assert found["routers of other groups"] == []
