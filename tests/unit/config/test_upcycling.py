"""UpcyclingConfig."""

import math

import pytest

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_moe_experts": 1}, "at least 2"),
        ({"moe_router_topk": 9}, "1 to num_moe_experts"),
        ({"moe_router_topk": 0}, "1 to num_moe_experts"),
        ({"moe_expert_capacity_factor": 0.0}, "positive number"),
        ({"router_init_std": -0.1}, "0 or more"),
        ({"router_init_std": math.inf}, "router_init_std is inf; expected a number of 0 or more"),
        ({"router_init_std": math.nan}, "router_init_std is nan"),
        (
            {"router_init_std": 1e300},
            r"router_init_std is 1e\+300; expected a number of 0 or more, up",
        ),
        ({"moe_aux_loss_coeff": 1e39}, r"moe_aux_loss_coeff is 1e\+39"),
        ({"moe_z_loss_coeff": math.nan}, "moe_z_loss_coeff is nan"),
        ({"moe_expert_capacity_factor": math.nan}, "moe_expert_capacity_factor is nan"),
        ({"moe_expert_capacity_factor": math.inf}, "or None to never drop a token"),
        ({"seed": -1}, "seed is -1; expected an integer from 0 to 9223372036854775807"),
        ({"seed": 2**63}, "seed is 9223372036854775808; expected an integer"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"moe_aux_loss_coeff": -1.0}, "0 or more"),
        ({"moe_router_topk": 1}, "the router would not learn"),
        ({"granularity": 3}, "a granularity that divides"),
        ({"granularity": 0}, "granularity is 0; expected 1 or more"),
        ({"granularity": -1, "num_moe_experts": -8}, "granularity is -1; expected 1 or more"),
        ({"weight_scaling": "half"}, "expected one of: None, exact, paper, none"),
        ({"moe_token_dispatcher_type": "magic"}, "alltoall, allgather, flex"),
        ({"moe_router_load_balancing_type": "luck"}, "aux_loss"),
        ({"moe_pad_expert_input_to_capacity": True}, "needs a capacity to pad to"),
        (
            {
                "moe_pad_expert_input_to_capacity": True,
                "moe_expert_capacity_factor": 4.0,
                "moe_token_dispatcher_type": "allgather",
            },
            "does not pad",
        ),
    ],
)
def test_bad_upcycling_is_refused(values: dict, message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        UpcyclingConfig(**values)


@pytest.mark.parametrize(
    ("values", "exact", "words"),
    [
        ({}, True, "sum to 1"),
        ({"moe_router_pre_softmax": True}, False, "a factor from 2/8 to 1"),
        ({"moe_expert_capacity_factor": 1.0}, False, "at 4 and above"),
        ({"moe_expert_capacity_factor": 4.0}, True, "sum to 1"),
        ({"num_moe_experts": None}, True, "every layer is the dense layer"),
        ({"num_moe_experts": 16, "moe_expert_capacity_factor": 4.0}, False, "drops"),
        ({"moe_expert_capacity_factor": 1.0}, False, "75% of the assignments"),
        ({"num_moe_experts": 32, "granularity": 4, "moe_router_topk": 8}, True, "whole copies"),
        ({"num_moe_experts": 32, "granularity": 4}, False, "use a multiple of 4"),
        ({"moe_shared_expert": True}, True, "sum to 1"),
        ({"moe_shared_expert": True, "weight_scaling": "none"}, False, "twice"),
        ({"initializer": "drop"}, False, "the initializer drop"),
    ],
)
def test_exactness_at_step_0(values: dict, exact: bool, words: str) -> None:
    found = UpcyclingConfig(**values).exactness(gated=True, dense_checkpoints=1)
    assert found.exact is exact
    assert words in found.reason


G4 = {"num_moe_experts": 32, "granularity": 4, "moe_router_topk": 8}


@pytest.mark.parametrize(
    ("values", "gated", "scales"),
    [
        ({}, True, (1, 1, 1)),
        (G4, True, (1, 2, 2)),
        (G4, False, (1, 4 ** (1 / 3), 4 ** (1 / 3))),
        (G4 | {"weight_scaling": "paper"}, True, (4 ** (1 / 3),) * 3),
        (G4 | {"weight_scaling": "none"}, True, (1, 1, 1)),
        # arXiv 2410.07524 Eq. 2: ∛(E·G²/T) = ∛(8·16/8), which is the default for G > 1
        (G4 | {"moe_router_pre_softmax": True}, True, (16 ** (1 / 3),) * 3),
        ({"moe_router_pre_softmax": True}, True, (1, 1, 1)),
        ({"moe_router_pre_softmax": True, "weight_scaling": "exact"}, True, (1, 2, 2)),
        (G4 | {"moe_shared_expert": True}, True, (1, 2, 1)),
    ],
)
def test_scales(values: dict, gated: bool, scales: tuple[float, float, float]) -> None:
    found = UpcyclingConfig(**values).scales(gated)
    assert (found.gate, found.up, found.down) == pytest.approx(scales)
    assert found.shared_down == (0.5 if "moe_shared_expert" in values else 1)


def test_experts_are_shards_of_copies() -> None:
    """arXiv 2410.07524 §3: expert e holds shard e mod G of copy e div G."""
    config = UpcyclingConfig(num_moe_experts=8, granularity=4, moe_router_topk=4)
    assert config.expansion_rate == 2
    assert [config.neurons(e, 100) for e in (0, 3, 4)] == [(0, 25), (75, 100), (0, 25)]
    assert [config.copy_of(e) for e in range(8)] == [0] * 4 + [1] * 4
