"""UpcyclingConfig."""

import math

import pytest

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError

G4 = {"num_moe_experts": 32, "granularity": 4, "moe_router_topk": 8}
PART_G4 = G4 | {"moe_shared_expert_intermediate_size": 0.25}
SIGMOID = {"moe_router_score_function": "sigmoid"}


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
        ({"moe_router_score_function": "tanh"}, "expected one of: softmax, sigmoid"),
        (SIGMOID | {"moe_router_pre_softmax": True}, "Leave moe_router_pre_softmax out"),
        ({"moe_router_enable_expert_bias": True}, "Set moe_router_score_function='sigmoid'"),
        ({"router_logit_normalization": 0.0}, "expected a number above 0, such as 1"),
        ({"router_logit_normalization": math.nan}, "router_logit_normalization is nan"),
        (
            {"router_dense_gradient": True, "moe_expert_capacity_factor": 4.0},
            "expected no capacity",
        ),
        (
            {"router_dense_gradient": True, "moe_token_dispatcher_type": "flex"},
            "and 'alltoall' or 'allgather'",
        ),
        ({"moe_router_bias_update_rate": -1.0}, "moe_router_bias_update_rate is -1.0"),
        ({"moe_shared_expert_intermediate_size": 0}, "expected 2 or more neurons, or a fraction"),
        ({"moe_shared_expert_intermediate_size": 1}, "expected 2 or more neurons"),
        ({"moe_shared_expert_intermediate_size": 2.5}, "expected 2 or more neurons"),
        ({"moe_shared_expert_intermediate_size": math.nan}, "expected 2 or more neurons"),
        (
            {"moe_shared_expert": True, "moe_shared_expert_intermediate_size": 64},
            "Leave one out",
        ),
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
        (SIGMOID, True, "sum to 1"),
        (SIGMOID | {"moe_router_topk": 1}, False, "does not normalize the sigmoid score"),
        ({"moe_shared_expert_intermediate_size": 0.25}, True, "that the shared expert leaves"),
        (PART_G4, True, "whole copies of the part"),
        (PART_G4 | {"weight_scaling": "none"}, False, "the routed output is divided by"),
        (PART_G4 | {"weight_scaling": "paper"}, False, "cube-root scaling"),
    ],
)
def test_exactness_at_step_0(values: dict, exact: bool, words: str) -> None:
    found = UpcyclingConfig(**values).exactness(gated=True, dense_checkpoints=1)
    assert found.exact is exact
    assert words in found.reason


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
        (PART_G4, True, (1, 2, 2)),
        (G4 | SIGMOID, True, (1, 2, 2)),
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


@pytest.mark.parametrize("size", [20, 0.2])
def test_routed_experts_are_shards_of_what_a_shared_part_leaves(size: float) -> None:
    config = UpcyclingConfig(
        num_moe_experts=8,
        granularity=4,
        moe_router_topk=4,
        moe_shared_expert_intermediate_size=size,
    )
    assert config.shared_width(100) == 20
    assert config.expert_width(100) == 20
    assert [config.neurons(e, 100) for e in (0, 3, 4)] == [(20, 40), (80, 100), (20, 40)]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0.255, "gives the shared expert 25.5 of 100 neurons; expected a whole number"),
        (100, "gives the shared expert 100 of 100 neurons"),
        (0.01, "gives the shared expert 1 of 100 neurons"),
        (30, "less 30 shared does not divide by granularity=4; choose a divisor of 70"),
    ],
)
def test_a_shared_part_that_does_not_fit_is_refused(size: float, message: str) -> None:
    config = UpcyclingConfig(
        num_moe_experts=8,
        granularity=4,
        moe_router_topk=4,
        moe_shared_expert_intermediate_size=size,
    )
    with pytest.raises(UpcyclingError, match=message):
        config.expert_width(100)
