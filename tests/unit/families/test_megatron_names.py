"""Which family a dense checkpoint with Megatron's fields is of, and what is of none."""

from typing import Any

import pytest

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import family_of
from nemo_upcycle.families.fields import architecture_fields, window_fields

NUMBERS = {
    "model_type": "megatron",
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 12,
    "num_attention_heads": 4,
    "vocab_size": 16,
}
NORM1P = {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True}
RELU2 = {"activation_func": "squared_relu", "gated_linear_unit": False}
NORM = {"normalization": "LayerNorm"}
ROOT = {"layernorm_zero_centered_gamma": True, "rounded_embedding_multiplier": 8**0.5}
GEGLU = {"activation_func": "gelu_tanh"}
SCALED = {
    "scale_factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 8192,
}

YARN = {
    "scale_factor": 4.0,
    "old_context_len": 32,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_attention_factor": 1.25,
}

FOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "a Llama": ("llama", {}),
    "a scaled Llama": ("llama", SCALED),
    "an interpolated Llama": ("llama", {"seq_len_interpolation_factor": 2.0}),
    "a Mistral": ("mistral", {"window_size": [3, 0]}),
    "a scaled Mistral": ("mistral", {"window_size": (3, 0), **SCALED}),
    "a Qwen2": ("qwen2", {"add_qkv_bias": True}),
    "a Qwen2 with a window": ("qwen2", {"add_qkv_bias": True, "window_size": [3, 0]}),
    "a Qwen3": ("qwen3", {"qk_layernorm": True, "kv_channels": 4}),
    "a Nemotron": ("nemotron", {**NORM1P, **RELU2, "rotary_percent": 0.5}),
    "a Llama with YaRN": ("llama", YARN | {"softmax_scale": 1.25**2 * 2**-0.5}),
    "a SmolLM3": ("smollm3", {"no_rope_freq": [0, 1]}),
    "a Granite": ("granite", {"softmax_scale": 0.5, "residual_multiplier": 0.22}),
    "YaRN without its attention factor": ("granite", YARN),
    "a Phi-3": ("phi3", {"rotary_percent": 0.75, "window_size": [3, 0]}),
    "a Gemma": ("gemma", {**GEGLU, **ROOT, "kv_channels": 4}),
    "a StableLM": ("stablelm", {**NORM, "add_qkv_bias": True, "rotary_percent": 0.25}),
    "a StableLM without biases": ("stablelm", {**NORM, **SCALED}),
    "off": ("llama", {"window_size": [-1, 0], "use_mup": None, "no_rope_freq": 0}),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_fields_say_the_family(name: str) -> None:
    model_type, fields = FOUND[name]
    config = NUMBERS | fields
    family = family_of(config)
    assert family.model_type == f"megatron {model_type}"
    arch = family.architecture(config)
    assert family.shapes(arch).keys() >= {
        parameter.format(layer=layer)
        for parameter in family.parameters
        for layer in range(2)
        if arch.add_qkv_bias or not parameter.endswith("linear_qkv.bias")
    }
    back = architecture_fields(arch) | window_fields(arch)
    said = {name: value for name, value in fields.items() if name in back}
    assert {name: _listed(back[name]) for name in said} == {
        name: _listed(value) for name, value in said.items()
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "biases and norms of queries": (
        {"add_qkv_bias": True, "qk_layernorm": True},
        (
            "add_qkv_bias=True",
            "qk_layernorm=True",
            "llama, mistral, qwen2, qwen3, nemotron, smollm3, phi3, granite, gemma, stablelm",
        ),
    ),
    "Llama with squared ReLU": (RELU2, ("gated_linear_unit=False",)),
    "Llama with another norm": (NORM1P, ("normalization='LayerNorm1p'",)),
    "a part rotated and some layers without RoPE": (
        {"rotary_percent": 0.5, "no_rope_freq": 2},
        ("rotary_percent=0.5", "no_rope_freq=2"),
    ),
    "Nemotron with a window": (
        {**NORM1P, **RELU2, "window_size": [3, 0]},
        ("normalization=", "gated_linear_unit=False", "window_size=[3, 0]"),
    ),
    "scaled Nemotron": ({**NORM1P, **RELU2, **SCALED}, ("scale_factor=8.0",)),
    "Qwen3 with a part rotated": (
        {"qk_layernorm": True, "rotary_percent": 0.25},
        ("qk_layernorm=True", "rotary_percent=0.25"),
    ),
    "GeGLU": ({"activation_func": "megatron.core.fusions.quick_gelu"}, ("quick_gelu",)),
    "GeLU": (
        {"activation_func": "gelu", "gated_linear_unit": False},
        ("activation_func='gelu'", "gated_linear_unit=False"),
    ),
    "gated squared ReLU": ({"activation_func": "squared_relu"}, ("gated_linear_unit=True",)),
    "SiLU without a gate": ({"gated_linear_unit": False, "activation_func": "silu"}, ("silu",)),
    "no function": ({"activation_func": None}, ("does not say which activation function",)),
    "RMSNorm plus 1": ({"layernorm_zero_centered_gamma": True}, ("normalization='RMSNorm1p'",)),
    "GELU by tanh": (GEGLU, ("activation_func='gelu_tanh'",)),
    "NeMo's own Gemma, whose factor of the embeddings no field says": (
        {"activation_func": "nemo.collections.llm.fn.activation.openai_gelu"},
        ("openai_gelu", "gelu_tanh"),
    ),
    "Gemma without its factor": (
        {**GEGLU, "layernorm_zero_centered_gamma": True},
        ("activation_func='gelu_tanh'", "normalization='RMSNorm1p'"),
    ),
    "Gemma with a factor of the logits": ({**GEGLU, **ROOT, "logits_scaling": 2.0}, ("logits_",)),
    "Llama with Gemma's factor": (
        {"rounded_embedding_multiplier": 2.0},
        ("rounded_embedding_multiplier=2.0",),
    ),
    "StableLM with norms of queries": ({**NORM, "qk_layernorm": True}, ("qk_layernorm=True",)),
    "L2Norm": ({"normalization": "L2Norm"}, ("normalization='L2Norm'",)),
    "MLA": ({"multi_latent_attention": True}, ("multi_latent_attention=True",)),
    "soft-capped attention": ({"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping=50.0",)),
    "soft-capped logits": ({"final_logit_softcapping": 30.0}, ("final_logit_softcapping=30.0",)),
    "norms after a layer": (
        {"apply_residual_connection_post_layernorm": True},
        ("apply_residual_connection_post_layernorm=True",),
    ),
    "windows in some layers": (
        {"window_size": [3, 0], "window_attn_skip_freq": 4},
        ("window_attn_skip_freq=4",),
    ),
    "a window to the right": ({"window_size": [3, 3]}, ("window_size=[3, 3]",)),
    "a window of words": ({"window_size": "all"}, ("window_size='all'",)),
    "norms by L2": ({"qk_l2_norm": True}, ("qk_l2_norm=True",)),
    "a gate of attention": ({"attention_output_gate": True}, ("attention_output_gate=True",)),
    "Qwen3 with layers without RoPE": (
        {"no_rope_freq": [0, 1], "qk_layernorm": True},
        ("no_rope_freq=[0, 1]", "qk_layernorm=True"),
    ),
    "layers without RoPE of other layers": ({"no_rope_freq": [0, 1, 1]}, ("for each of 2 layers",)),
    "Qwen3 with scaled scores": (
        {"softmax_scale": 0.5, "qk_layernorm": True},
        ("attention_multiplier=0.5", "qk_layernorm=True"),
    ),
    "Qwen2 with scaled logits": (
        {"logits_scaling": 8.0, "add_qkv_bias": True},
        ("logits_scaling=8.0", "add_qkv_bias=True"),
    ),
    "YaRN": ({"position_embedding_type": "yarn"}, ("position_embedding_type='yarn'",)),
    "µP": ({"use_mup": True}, ("use_mup=True",)),
    "sinks": ({"softmax_type": "learnable"}, ("softmax_type='learnable'",)),
    "more tokens": ({"mtp_num_layers": 1}, ("mtp_num_layers=1",)),
    "Mamba": ({"hybrid_layer_pattern": "M*-"}, ("hybrid_layer_pattern='M*-'",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_family_computes_is_refused_by_name(name: str) -> None:
    fields, words = REFUSED[name]
    with pytest.raises(UpcyclingError) as error:
        family_of(NUMBERS | fields)
    assert all(word in str(error.value) for word in words), str(error.value)
