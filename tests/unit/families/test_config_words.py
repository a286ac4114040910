"""What a `config.json` means, in the words of transformers 4, of 5 and of both."""

import inspect
import math
from typing import Any

import pytest

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import FAMILIES, Architecture
from nemo_upcycle.families.config_words import in_words_of_transformers_4
from nemo_upcycle.families.defaults import DEFAULTS
from nemo_upcycle.families.moe_config import MOE_FAMILIES, moe_model
from tests.tiny import CONFIG, LLAMA31_ROPE, YARN

LINEAR = {"rope_type": "linear", "factor": 2.0}
SIZES = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
THETA = 5e5


def read(family: str, **config: Any) -> Architecture:
    """Return what is read of a config of a tiny model."""
    config = {"pad_token_id": 0, **({"head_dim": 8} if family == "mixtral" else {}), **config}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 1,
    }
    if family in MOE_FAMILIES:
        return moe_model({**SIZES, **experts, "model_type": family, **config}).arch
    return FAMILIES[family].architecture({**SIZES, "model_type": family, **config})


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "mixtral", "qwen2_moe"]
)
@pytest.mark.parametrize(
    "scaling",
    [None, LINEAR, LLAMA31_ROPE, {**YARN, "attention_factor": 1.0}],
    ids=["none", "linear", "llama3", "yarn"],
)
@pytest.mark.parametrize("words", ["all of 5", "theta at the top", "also null", "both, the same"])
def test_words_of_transformers_5(family: str, scaling: dict | None, words: str) -> None:
    expected = read(family, rope_theta=THETA, rope_scaling=scaling)
    assert expected.rotary_base == THETA
    inside: dict[str, Any] = {**(scaling or {"rope_type": "default"}), "rope_theta": THETA}
    config: dict[str, Any] = {"rope_parameters": inside}
    if words == "theta at the top":
        config["rope_theta"] = inside.pop("rope_theta")
    elif words == "also null":
        config |= {"rope_theta": None, "rope_scaling": None}
    elif words == "both, the same":
        config |= {"rope_theta": THETA, "rope_scaling": scaling}
    assert read(family, **config) == expected
    assert read(family, **in_words_of_transformers_4(config)) == expected


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [(0.25, None, 0.25), (None, 0.25, 0.25), (0.25, 0.25, 0.25), (None, None, 0.5)],
)
def test_partial_rotary_factor(inside: Any, outside: Any, expected: float) -> None:
    config: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    if inside is not None:
        config["rope_parameters"]["partial_rotary_factor"] = inside
    if outside is not None:
        config["partial_rotary_factor"] = outside
    arch = read("nemotron", **config)
    assert (arch.rotary_percent, arch.rotary_base) == (expected, THETA)


@pytest.mark.parametrize("family", sorted(MOE_FAMILIES))
def test_number_of_experts_by_either_name(family: str) -> None:
    own = {"qwen2_moe": ["num_experts"], "glm4_moe": ["n_routed_experts"]}
    either = ["num_experts", "num_local_experts"]
    names = either if family in ("mixtral", "qwen3_moe") else own.get(family, either[1:])
    for name in names:
        config = {**SIZES, "model_type": family, "shared_expert_intermediate_size": 1, name: 16}
        config["moe_intermediate_size"] = 48
        assert moe_model(config).num_experts == 16


def test_layers_without_rope() -> None:
    """Every fourth unless the config says otherwise; a window in them alone is in no other."""
    assert read("smollm3").nope_layers == (3,)
    assert read("smollm3", no_rope_layer_interval=2).nope_layers == (1, 3)
    assert read("smollm3", no_rope_layers=[0, 1, 1, 0]).nope_layers == (0, 3)
    windows = {"use_sliding_window": True, "sliding_window": 16}
    assert read("smollm3", no_rope_layers=[0] * 4, **windows).sliding_window == 16
    assert read("smollm3", sliding_window=16).sliding_window is None


def test_biases_of_a_stablelm_are_a_setting() -> None:
    assert not read("stablelm").add_qkv_bias
    arch = read("stablelm", use_qkv_bias=True)
    assert arch.add_qkv_bias and arch.normalization == "LayerNorm"
    with_biases, without = (FAMILIES["stablelm"].shapes(each) for each in (arch, read("stablelm")))
    assert {name.split(".", 3)[3] for name in with_biases.keys() - without.keys()} == {
        f"self_attn.{letter}_proj.bias" for letter in "qkv"
    }


def test_a_gemmas_embeddings_have_a_factor_of_their_own() -> None:
    arch = read("gemma")
    assert arch.rounded_embedding_multiplier == 64**0.5 and arch.embedding_multiplier == 1
    assert read("llama").rounded_embedding_multiplier == 1


def test_attention_factor_of_yarn() -> None:
    """Given, from two weights, or from the factor alone; as in transformers."""

    def factor(**said: Any) -> float:
        scaling = read("llama", rope_scaling={**YARN, **said}).rope_scaling
        assert scaling is not None
        return scaling["attention_factor"]

    assert factor() == factor(mscale=0.7) == 0.1 * math.log(4.0) + 1
    assert factor(attention_factor=0.5, mscale=1, mscale_all_dim=2) == 0.5
    assert factor(mscale=1, mscale_all_dim=0.5) == factor() / (0.05 * math.log(4.0) + 1)
    assert factor(factor=0.5) == 1
    assert read("llama", rope_scaling={**YARN, "attention_factor": 1.0}).softmax_scale is None
    assert read("llama", rope_scaling=YARN).softmax_scale == factor() ** 2 * 8**-0.5


def test_translation_is_the_same_again() -> None:
    config = {"model_type": "llama", "rope_parameters": {**LLAMA31_ROPE, "rope_theta": THETA}}
    once = in_words_of_transformers_4(config)
    assert once == {"model_type": "llama", "rope_theta": THETA, "rope_scaling": LLAMA31_ROPE}
    assert in_words_of_transformers_4(once) == once


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_act": "swish"}, {}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"seq_len_interpolation_factor": 2}),
        ({"rope_scaling": {"type": "default"}}, {}),
        ({"rope_scaling": {**LINEAR, "type": None}}, {"seq_len_interpolation_factor": 2}),
        ({"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2}},
         {"seq_len_interpolation_factor": 2}),
        (
            {"rope_scaling": {k: LLAMA31_ROPE[k] for k in list(LLAMA31_ROPE)[:4]}},
            {"rope_scaling": {**LLAMA31_ROPE, "original_max_position_embeddings": 128}},
        ),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}, {}),
        ({"use_sliding_window": True, "sliding_window": 16}, {}),
        ({"use_sliding_window": True, "sliding_window": None}, {}),
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 4},
         {}),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
         {"sliding_window": 16}),
        ({"use_sliding_window": True, "sliding_window": 16,
          "layer_types": ["sliding_attention"] * 4}, {"sliding_window": 16}),
        ({"attention_bias": True, "mlp_bias": True, "attention_dropout": 0.1}, {}),
        ({"tie_word_embeddings": None, "num_key_value_heads": None},
         {"num_query_groups": 8}),
        ({"head_dim": 16}, {"kv_channels": 16}),
    ],
)  # fmt: skip
def test_what_transformers_reads_is_read(config: dict, expected: dict) -> None:
    from dataclasses import replace

    assert read("qwen2", **config) == replace(read("qwen2"), **expected)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama", {"rope_theta": None}, "rope_theta=null; expected a number above 0"),
        ("llama", {"rope_theta": "10000"}, "rope_theta='10000'; expected a number above 0"),
        ("llama", {"rope_theta": 10**400}, "…; expected a number above 0"),
        ("llama", {"rope_theta": math.nan}, "rope_theta=nan; expected a number above 0"),
        ("llama", {"rms_norm_eps": math.inf}, "rms_norm_eps=inf; expected a number above 0"),
        ("llama", {"rope_scaling": {**LLAMA31_ROPE, "low_freq_factor": 10**400}}, "above 0"),
        ("llama", {"num_hidden_layers": 10**400}, "…; expected an integer of at most 10000"),
        ("llama", {"hidden_size": 2**31}, "hidden_size=2147483648; expected an integer of at most"),
        ("llama", {"vocab_size": math.nan}, "vocab_size=nan; expected an integer"),
        ("mixtral", {"num_experts": 10**6}, "an integer of at most 10000"),
        ("nemotron", {"partial_rotary_factor": 1.7e308}, "a number above 0 and at most 1"),
        ("llama", {"rope_scaling": {"rope_type": None, "type": None}}, "expected a name"),
        ("llama", {"rope_scaling": {"rope_type": None, "factor": 2.0}}, "expected a name"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear'; expected an object"),
        ("llama", {"rope_parameters": []}, "expected an object"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, "without a rope_type"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor of RoPE scaling=null"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": True}}, "a number above 0"),
        ("llama", {"rope_scaling": {**LINEAR, "type": "default"}}, "or the same"),
        ("llama", {"rope_scaling": {**LINEAR, "rope_theta": 5.0}}, "say rope_theta beside"),
        ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": THETA}}, "expected one"),
        ("llama", {"rope_parameters": LINEAR, "rope_scaling": LLAMA31_ROPE}, "same in both"),
        ("llama", {"rope_parameters": {"full_attention": LINEAR}}, "differs by kind of layer"),
        ("llama", {"rope_scaling": LLAMA31_ROPE, "original_max_position_embeddings": 16}, "and 16"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "the same without it"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "depend on a sequence's length"),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "factor of RoPE scaling=null"),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": -1}}, "beta_fast of RoPE scaling=-1"),
        ("llama", {"rope_scaling": {**YARN, "truncate": 1}}, "truncate of RoPE scaling=1"),
        ("llama", {"rope_scaling": {**YARN, "mscale": "1", "mscale_all_dim": 1}}, "mscale of RoPE"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0},
             "original_max_position_embeddings": 32},
            "say original_max_position_embeddings in rope_scaling",
        ),
        ("mixtral", {"rope_scaling": YARN, "head_dim": None}, "'yarn' with head_dim=null"),
        ("smollm3", {"rope_scaling": YARN}, "layers [3] without RoPE; Megatron can only scale all"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers=[1, 0, 1]; expected 0 or 1"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0; expected"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 16}, "window in layers [3]"),
        ("smollm3", {"pad_token_id": 128004}, "one of the vocabulary's 256 tokens"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "'longrope'; only none can"),
        ("phi3", {"rope_scaling": YARN}, "'yarn'; only none can be upcycled"),
        ("phi3", {"rope_scaling": LINEAR}, "'linear'; only none can be upcycled"),
        ("llama", {"partial_rotary_factor": 0.5}, "with which transformers 4 computes nothing"),
        ("llama", {"num_hidden_layers": 4.0}, "num_hidden_layers=4.0; expected an integer"),
        ("llama", {"hidden_size": "64"}, "hidden_size='64'; expected an integer"),
        ("llama", {"tie_word_embeddings": "false"}, "expected true or false"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True; expected false"),
        ("llama", {"pad_token_id": 256}, "one of the vocabulary's 256 tokens"),
        ("llama", {"per_layer_config": {"0": {"head_dim": 4}}}, "of which transformers 5 makes"),
        ("llama", {"is_causal": False}, "is_causal=False, with which tokens see those after them"),
        ("qwen3_moe", {"is_causal": None}, "is_causal=None, with which tokens see those after"),
        ("llama", {"attention_chunk_size": 8}, "attention_chunk_size=8, by which transformers'"),
        ("nemotron", {"sliding_window": 8}, "sliding_window=8, by which transformers' cache"),
        ("mixtral", {"num_kv_shared_layers": 1}, "cache of keys and values is cut"),
        ("llama", {"head_dim": 7}, "expected pairs of them"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0; expected an integer"),
        ("mistral", {"sliding_window": 16, "layer_types": ["full_attention"] * 4}, "layer_types="),
        ("qwen2", {"head_dim": None}, "head_dim=null"),
        ("qwen3", {"head_dim": None}, "head_dim=null"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "expected ['full_attention'"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "for each of 4 layers"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
            "a sliding window in layers [3] of 4",
        ),
        ("nemotron", {"num_key_value_heads": None}, "num_key_value_heads=null"),
        ("nemotron", {"partial_rotary_factor": 0.25,
                      "rope_parameters": {"partial_rotary_factor": 0.5}}, "expected one"),
        ("nemotron", {"rope_scaling": LINEAR}, "scaling 'linear' in a Nemotron"),
        ("qwen2_moe", {"use_sliding_window": True}, "windows in different layers"),
        ("qwen2_moe", {"head_dim": 16}, "attention heads of 128 numbers"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "expected one at least"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 of 4 experts"),
        ("qwen3_moe", {"num_local_experts": 8}, "num_local_experts=8 and num_experts=4"),
        ("mixtral", {"num_experts_per_tok": 1}, "one expert with a weight of 1"),
        ("gemma", {"hidden_act": "gelu"}, "hidden_act='gelu'; expected 'gelu_pytorch_tanh': the"),
        ("gemma", {"attention_bias": True}, "attention_bias=True; expected false"),
        ("gemma", {"num_key_value_heads": None}, "num_key_value_heads=null"),
        ("gemma", {"use_bidirectional_attention": True}, "with which tokens of a Gemma see those"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True; expected false"),
        ("stablelm", {"head_dim": 32}, "head_dim=32; expected 8, the hidden size over the heads"),
        ("stablelm", {"hidden_size": 66}, "hidden_size=66; expected a multiple of num_attention"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual=True; expected"),
        ("stablelm", {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 48},
         "RoPE over 3 of the 12 numbers of a head; expected pairs"),
    ],
)  # fmt: skip
def test_what_transformers_or_megatron_do_not_compute_is_refused(
    family: str, config: dict, message: str
) -> None:
    with pytest.raises(UpcyclingError) as error:
        read(family, **config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_defaults_are_those_of_transformers_4(family: str) -> None:
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[family]
    silent = cls()
    assert DEFAULTS[family] == _as_in_signature(cls, DEFAULTS[family])
    assert silent.rope_theta == DEFAULTS[family]["rope_theta"]


def _as_in_signature(cls: type, keys: Any) -> dict[str, Any]:
    """Return the defaults in a class's signature, which says null where the instance derives."""
    parameters = inspect.signature(cls.__init__).parameters
    # `layer_types` is of a Qwen2 and a Qwen3, not of a Qwen2-MoE; null does nothing. Of tied
    # embeddings the base class decides.
    unsaid = {"tie_word_embeddings": cls().tie_word_embeddings}
    return {key: parameters[key].default if key in parameters else unsaid.get(key) for key in keys}
