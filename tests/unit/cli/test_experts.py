"""The options for experts."""

import pytest

from nemo_upcycle.cli.experts import expert_settings, upcycling_config
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError


def test_without_options_the_model_is_e8t2():
    assert upcycling_config(experts=None, topk=None) == UpcyclingConfig()


def test_options_become_fields():
    chosen = upcycling_config(granularity=4, topk=8, layers="skip_first=1", initializer="drop")
    assert chosen.label == "E8G4T8"
    assert (chosen.moe_layer_freq, chosen.initializer) == ("skip_first=1", "drop")
    assert upcycling_config(experts=4, seed=7) == UpcyclingConfig(num_moe_experts=4, seed=7)


def test_a_field_and_an_option_are_settings_of_a_recipe():
    settings = expert_settings(experts=4, topk=None, initializer="drop(ratio=0.3)")
    assert settings == ["num_moe_experts=4", "initializer=drop(ratio=0.3)"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "num_moe_experts is 1; an MoE needs at least 2"),
        ({"experts": 4, "topk": 5}, "moe_router_topk is 5"),
        ({"initializer": "dorp"}, "dorp"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(UpcyclingError, match=message):
        upcycling_config(**options)
