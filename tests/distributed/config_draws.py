"""Random tiny checkpoints whose `config.json` says all that transformers reads, in any words.

A draw is a family and a seed. Sizes are drawn first, and the weights have them; then what the
config says of them and of all else: in the words of transformers 4, of 5 or of both, present,
absent, null, unusual, or of the wrong kind.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

GRANITE_MOE = ("granitemoe", "granitemoeshared")
GRANITE = ("granite", *GRANITE_MOE)
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", *GRANITE_MOE)
DENSE = ("llama", "mistral", "qwen2", "qwen3", "nemotron", "smollm3", "phi3", "granite")
DENSE += ("gemma", "stablelm")
FAMILIES = (*DENSE, *MOE)
VOCABULARY = 96
ABSENT = object()


@dataclass(frozen=True)
class Sizes:
    """What the weights are made of."""

    hidden: int
    heads: int
    groups: int
    width: int
    ffn: int
    layers: int
    experts: int
    expert_width: int
    shared: int
    is_moe: tuple[bool, ...]
    is_tied: bool
    has_qkv_bias: bool
    has_qk_norm: bool


def config_of(family: str, seed: int) -> tuple[dict[str, Any], Sizes]:
    """Return a config and the sizes of its weights."""
    random = Random(f"{family} {seed}")
    config: dict[str, Any] = {"model_type": family, "vocab_size": VOCABULARY}
    sizes = _sizes(random, family, config)
    config |= _rope(random, family)
    config |= _windows(random, family, sizes.layers)
    eps, acts = "rms_norm_eps", ["silu", "swish"]
    if family == "nemotron":
        eps, acts = "norm_eps", ["relu2"]
    if family == "gemma":
        acts = ["gelu_pytorch_tanh"]
    if family == "stablelm":
        eps = "layer_norm_eps"
    for key, values in {
        eps: [ABSENT, 1e-6, 1e-5, 0.1, 0.5],
        "hidden_act": [ABSENT, *acts * 20, "gelu"],
        "initializer_range": [ABSENT, 0.02, 0.1],
        "max_position_embeddings": [128, 128, 64, 32, ABSENT],
        "pad_token_id": [0 if family in ("smollm3", "phi3") else ABSENT] * 16
        + [None, ABSENT, 0, -1, VOCABULARY],
        "attention_bias": [ABSENT] * 12 + [False] * 8 + [True],
        "mlp_bias": [ABSENT] * 10 + [False] * 8 + [True],
        "attention_dropout": [ABSENT, ABSENT, 0.0, 0.1],
        "pretraining_tp": [ABSENT, ABSENT, 1, 2],
        **_multipliers(family),
        "no_rope_layers": _rotating(family, sizes.layers),
        "no_rope_layer_interval": [ABSENT] * 3 + [2, 3],
        **_features(family),
        "is_causal": [ABSENT] * 16 + [True, True, None, False],
        "router_jitter_noise": [ABSENT, 0.1],
        "output_router_logits": [ABSENT, False, True],
        "transformers_version": [ABSENT, "4.40.0", "4.57.6", "5.1.0"],
        "use_cache": [ABSENT, True, False],
        "torch_dtype": [ABSENT, "float32", "bfloat16"],
        "dtype": [ABSENT, "float32"],
    }.items():
        value = random.choice(values)
        if not (family == "glm4_moe" and key == "attention_bias"):  # which has been said
            _say(config, key, value)
    if random.random() < 0.12:
        _damage(random, config)
    return config, sizes


def _multipliers(family: str) -> dict[str, list[Any]]:
    if family not in GRANITE:
        return {
            "logits_scaling": [ABSENT] * 5 + [8.0],
            "attention_multiplier": [ABSENT] * 5 + [0.5],
        }
    return {
        "embedding_multiplier": [ABSENT, 1, 12.0, 0.5],
        "residual_multiplier": [ABSENT, 1.0, 0.22, 2],
        "attention_multiplier": [ABSENT, 0.25, 0.1, 0.5],
        "logits_scaling": [ABSENT, 1.0, 8, 0.3],
    }


def _features(family: str) -> dict[str, list[Any]]:
    """Return keys of one family, with which its models compute something else."""
    rarely = [ABSENT] * 36 + [False, False, True]
    if family == "stablelm":
        return {"qk_layernorm": rarely, "use_parallel_residual": rarely}
    return {"use_bidirectional_attention": [*rarely, None]} if family == "gemma" else {}


def _rotating(family: str, layers: int) -> list[Any]:
    if family != "smollm3":
        return [ABSENT] * 5 + [[1, 0]]
    mixed = [int(layer % 2 == 0) for layer in range(layers)]
    usual = [ABSENT, ABSENT, None, [1] * layers, [0] * layers, mixed]
    return [*usual * 3, mixed[1:]]


def _say(config: dict[str, Any], key: str, value: Any) -> None:
    if value is not ABSENT:
        config[key] = value


def _sizes(random: Random, family: str, config: dict[str, Any]) -> Sizes:
    heads = random.choice([2, 4, 8])
    hidden = heads * random.choice([4, 8, 12])
    groups = random.choice([n for n in (1, 2, 4, 8) if heads % n == 0])
    often = 30 if family in ("qwen2_moe", "stablelm", *GRANITE_MOE) else 3
    width = random.choice([hidden // heads] * often + [8, 16])
    layers = random.choice([2, 2, 3])
    unsaid = {"qwen3": 128, "gemma": 256}
    if family in unsaid and random.random() < 0.1:
        width, said = unsaid[family], ABSENT
    elif width != hidden // heads:
        said = width
    else:
        derives = family in ("llama", "mistral", "nemotron", "mixtral")
        choices = [width, ABSENT, None] if derives else [width, ABSENT, ABSENT]
        said = width if family in unsaid else random.choice(choices)
    _say(config, "head_dim", said)
    never_null = ("nemotron", "qwen2_moe", "glm4_moe", "gemma", "stablelm")
    one_each = groups == heads and family not in never_null
    silent = [ABSENT, None] if one_each or random.random() < 0.05 else []
    _say(config, "num_key_value_heads", random.choice([groups, groups, groups, *silent]))
    ffn = random.choice([48, 64])
    config |= {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    tied = random.choice([ABSENT, False, True] * 8 + [None])
    is_tied = tied is True or (tied is ABSENT and family in ("smollm3", "gemma"))
    _say(config, "tie_word_embeddings", tied)
    bias = family == "qwen2"
    if family == "stablelm":
        bias = random.choice([False, True])
        _say(config, "use_qkv_bias", bias or random.choice([ABSENT, False]))
    experts, expert_width, shared, is_moe = 0, ffn, 0, (False,) * layers
    if family in MOE:
        experts, is_moe = random.choice([2, 4, 8]), (True,) * layers
        names = {
            "mixtral": "num_local_experts",
            "qwen2_moe": "num_experts",
            "glm4_moe": "n_routed_experts",
        }
        names |= dict.fromkeys(GRANITE_MOE, "num_local_experts")
        name = names.get(family) or random.choice(["num_experts", "num_local_experts"])
        if family == "mixtral" and random.random() < 0.1:
            name = "num_experts"
        config[name] = experts
        if random.random() < 0.1 and family not in GRANITE_MOE:
            config["num_experts"] = random.choice([experts, 4])
        topk = random.choice([2] * 6 + [experts, experts, 1, experts + 1, ABSENT])
        _say(config, "num_experts_per_tok", topk)
    if family in ("qwen2_moe", "qwen3_moe"):
        expert_width = random.choice([ffn, ffn // 2])
        config["moe_intermediate_size"] = expert_width
        _say(config, "norm_topk_prob", random.choice([ABSENT, True, False, None]))
        step = random.choice([ABSENT, 1, 1, 1, 2])
        dense = random.choice([ABSENT, None, [], [0], [0], [5], [1]])
        _say(config, "decoder_sparse_step", step)
        _say(config, "mlp_only_layers", dense)
        step, dense = 1 if step is ABSENT else step, dense if isinstance(dense, list) else []
        is_moe = tuple(n not in dense and (n + 1) % step == 0 for n in range(layers))
    if family == "qwen2_moe":
        shared = random.choice([1] * 6 + [ffn] * 6 + [24])
        config["shared_expert_intermediate_size"] = shared
        said = random.choice([ABSENT, True, False])
        bias = said is not False
        _say(config, "qkv_bias", said)
    if family == "granitemoeshared":
        shared = random.choice([0, ffn, 2 * ffn])
        config["shared_intermediate_size"] = shared
    norm = family in ("qwen3", "qwen3_moe")
    if family == "glm4_moe":
        expert_width = random.choice([ffn, ffn // 2])
        shared = random.choice([ABSENT, 0, 1, 2])
        first = random.choice([ABSENT, 0, 0, 1] * 4 + [layers])
        norm_topk = random.choice([ABSENT, True, True, topk != 1, topk != 1] * 4 + [None])
        bias, norm = random.choice([False, True]), random.choice([False, True])
        config["moe_intermediate_size"] = expert_width
        for key, value in {
            "n_shared_experts": shared,
            "first_k_dense_replace": first,
            "norm_topk_prob": norm_topk,
            "attention_bias": bias or random.choice([ABSENT, False]),
            "use_qk_norm": norm or random.choice([ABSENT, False]),
            "n_group": random.choice([ABSENT, 1] * 8 + [2]),
            "topk_group": random.choice([ABSENT, 1]),
            "routed_scaling_factor": random.choice([ABSENT, 1.0, 1] * 6 + [2.5]),
            "num_local_experts": random.choice([ABSENT] * 18 + [experts, 4]),
        }.items():
            _say(config, key, value)
        shared = (1 if shared is ABSENT else shared) * expert_width
        first = 1 if first is ABSENT else first
        is_moe = tuple(layer >= first for layer in range(layers))
    return Sizes(
        hidden, heads, groups, width, ffn, layers, experts, expert_width, shared, is_moe,
        is_tied, bias, norm,
    )  # fmt: skip


# --- RoPE ----------------------------------------------------------------------------------------


def _rope(random: Random, family: str) -> dict[str, Any]:
    theta = random.choice([ABSENT, 10000.0, 500, 5e5, 5e5])
    partial: Any = ABSENT
    if family in ("nemotron", "phi3", "glm4_moe"):
        partial = random.choice([ABSENT, 0.25, 0.5, 0.75, 1.0, 1])
    elif family == "stablelm":  # which rotates even numbers alone
        partial = random.choice([ABSENT, 0.25, 0.5, 0.5, 0.5, 0.5, 1.0, 1])
    elif random.random() < 0.05:
        partial = random.choice([0.5, 1.0])
    scaling = _scaling(random, family)
    words = random.choice(["4", "4", "5", "5", "5 and theta of 4", "both"])
    found: dict[str, Any] = {}
    if words == "4":
        _say(found, "rope_theta", theta)
        _say(found, "partial_rotary_factor", partial)
        _say(found, "rope_scaling", random.choice([ABSENT, None]) if scaling is None else scaling)
    elif words != "both":
        inside = {"rope_type": "default"} if scaling is None else dict(scaling)
        if scaling is None and random.random() < 0.2:
            del inside["rope_type"]
        _say(inside if words == "5" else found, "rope_theta", theta)
        _say(random.choice([inside, inside, found]), "partial_rotary_factor", partial)
        found["rope_parameters"] = inside
    else:
        found = _mixture(random, theta, partial, scaling)
    if random.random() < 0.1:
        length = random.choice([16, 32, None])
        found["original_max_position_embeddings"] = length
    return found


def _mixture(random: Random, theta: Any, partial: Any, scaling: dict | None) -> dict[str, Any]:
    """Say each word at the top, in `rope_parameters`, in `rope_scaling` or in several of them."""
    five, four = (
        dict(scaling) if scaling is not None and random.random() < 0.6 else {} for _ in range(2)
    )
    found: dict[str, Any] = {}
    for word, value in {"rope_theta": theta, "partial_rotary_factor": partial}.items():
        if value is ABSENT:
            continue
        for place in random.sample([found, five, five, four], random.choice([1, 2, 2])):
            place[word] = value if random.random() < 0.9 else random.choice([10000.0, None])
    if random.random() < 0.5:
        five.setdefault("rope_type", "default")
    _say(found, "rope_parameters", five or random.choice([ABSENT, None, {}]))
    _say(found, "rope_scaling", four or random.choice([ABSENT, ABSENT, None, {}]))
    return found


def _scaling(random: Random, family: str) -> dict[str, Any] | None:
    kinds = [None] * 10 + ["linear"] * 6 + ["llama3"] * 6 + ["default"] * 2 + ["yarn"] * 6
    kinds += ["su", "dynamic", "longrope"]
    kind = random.choice([*kinds, *([None] * 90 if family in ("nemotron", "phi3") else [])])
    if kind is None:
        return None
    name = random.choice(["rope_type", "rope_type", "type"])
    found: dict[str, Any] = {name: kind}
    if random.random() < 0.05:
        found[{"rope_type": "type", "type": "rope_type"}[name]] = random.choice([kind, "default"])
    if random.random() < 0.04:
        del found[name]
    if kind != "default" or random.random() < 0.3:
        found["factor"] = random.choice([2.0, 4, 0.5, 8.0])
    if kind == "llama3":
        low, high = random.choice([(1.0, 4.0), (1, 4), (1.5, 3.0), (4.0, 1.0), (2.0, 2.0)])
        found |= {"low_freq_factor": low, "high_freq_factor": high}
        _say(found, "original_max_position_embeddings", random.choice([16, 32, 32, ABSENT]))
    if kind == "yarn":
        found |= _yarn(random)
    elif random.random() < 0.1:
        found["attention_factor"] = 0.5
    return found


def _yarn(random: Random) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, values in {
        "original_max_position_embeddings": [8, 16, 32, 32, ABSENT],
        "beta_fast": [ABSENT, ABSENT, 32, 8.0, 2.0, None],
        "beta_slow": [ABSENT, ABSENT, 1, 0.5, 4.0],
        "mscale": [ABSENT, ABSENT, 1.0, 0.7, 0],
        "mscale_all_dim": [ABSENT, ABSENT, 1.0, 0.5],
        "attention_factor": [ABSENT, ABSENT, None, 1.0, 0.5, 1.3],
        "truncate": [ABSENT, ABSENT, True, False],
    }.items():
        _say(found, key, random.choice(values))
    return found


# --- Windows -------------------------------------------------------------------------------------


def _windows(random: Random, family: str, layers: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    reads = {"llama": 0.1, "nemotron": 0.1, "glm4_moe": 0.1, "mistral": 0.8, "mixtral": 0.8}
    reads |= {"phi3": 0.8, "smollm3": 0.8, "gemma": 0.1, "stablelm": 0.1}
    reads |= dict.fromkeys(GRANITE, 0.1)
    if random.random() < reads.get(family, 0.9):
        _say(found, "sliding_window", random.choice([ABSENT, None, 4, 8, 36, 4096]))
    if family.startswith("qwen") or family == "smollm3":
        often = {"qwen2_moe": 0.05, "smollm3": 0.2}.get(family, 0.5)
        is_used = random.random() < often or random.choice([ABSENT, False])
        _say(found, "use_sliding_window", is_used)
        _say(found, "max_window_layers", random.choice([ABSENT, 0, 0, 1, layers]))
    if random.random() < (0.3 if family in ("qwen2", "qwen3") else 0.1):
        kinds = ["full_attention", "sliding_attention"]
        one = random.choice([*kinds, *kinds, "chunked_attention", "attention"])
        found["layer_types"] = random.choice(
            [None, [one] * layers, [one] * layers, random.choices(kinds, k=layers), [one]]
        )
    return found


# --- Values of the wrong kind --------------------------------------------------------------------


def _damage(random: Random, config: dict[str, Any]) -> None:
    """Make a value, or one of RoPE's, null, a string, a float, a list, true, 0 or negative."""
    inside = [key for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    words = ("model_type", "transformers_version", "torch_dtype", "dtype")
    keys = [key for key in config if key not in words]
    place, key = config, random.choice([*keys, "rope_theta", "rope_scaling", "rope_parameters"])
    if inside and random.random() < 0.3:
        name = random.choice(inside)
        place = config[name] = dict(config[name])
        key = random.choice(list(place))
    value = place.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    place[key] = random.choice(
        [None, None, str(value), [value], True, 0, -1, {}, *([float(value)] * 3 if number else [])]
    )


# --- Weights -------------------------------------------------------------------------------------


def write(directory: Path, family: str, seed: int) -> Path:
    """Write a draw as a Hugging Face directory."""
    import torch
    from safetensors.torch import save_file

    config, sizes = config_of(family, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(family, sizes).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            values *= 0.3
        elif "norm" in name:
            values = 0.3 * values + (family not in ("nemotron", "gemma"))  # which add 1
        elif "embed" not in name:
            values *= 1.5 / max(1, shape[-1]) ** 0.5  # a shared expert may have no neurons
        tensors[name] = values
    inert = Random(seed).random() < 0.9
    for name in tensors:
        gate = name.endswith("shared_expert_gate.weight")
        if inert and (gate or (".shared_expert." in name and sizes.shared == 1)):
            tensors[name].zero_()
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def shapes(family: str, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a family's model in transformers 4, with their shapes."""
    hidden, queries, keys = sizes.hidden, sizes.heads * sizes.width, sizes.groups * sizes.width
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    if not sizes.is_tied:
        found["lm_head.weight"] = (VOCABULARY, hidden)
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        projections = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        if family == "phi3":
            projections = {"qkv_proj": queries + 2 * keys}
        for name, rows in projections.items():
            found[f"{attention}{name}.weight"] = (rows, hidden)
            if sizes.has_qkv_bias:
                found[f"{attention}{name}.bias"] = (rows,)
        found[attention + "o_proj.weight"] = (hidden, queries)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{norm}.weight"] = (hidden,)
        if sizes.has_qk_norm:
            for norm in ("q_norm", "k_norm"):
                found[f"{attention}{norm}.weight"] = (sizes.width,)
        found |= _feed_forward(prefix, family, sizes, sizes.is_moe[layer])
    if family in ("nemotron", "stablelm"):
        norms = [name for name in found if "norm" in name]
        found |= {name.removesuffix("weight") + "bias": found[name] for name in norms}
    return found


def _feed_forward(
    prefix: str, family: str, sizes: Sizes, is_moe: bool
) -> dict[str, tuple[int, ...]]:
    hidden = sizes.hidden

    def gated(place: str, width: int, names: tuple[str, str, str]) -> dict[str, tuple[int, ...]]:
        gate, up, down = names
        inner, outer = (width, hidden), (hidden, width)
        return {
            f"{place}{gate}.weight": inner,
            f"{place}{up}.weight": inner,
            f"{place}{down}.weight": outer,
        }

    usual, mlp = ("gate_proj", "up_proj", "down_proj"), prefix + "mlp."
    if family == "nemotron":
        return {
            mlp + "up_proj.weight": (sizes.ffn, hidden),
            mlp + "down_proj.weight": (hidden, sizes.ffn),
        }
    if family == "phi3":
        return {
            mlp + "gate_up_proj.weight": (2 * sizes.ffn, hidden),
            mlp + "down_proj.weight": (hidden, sizes.ffn),
        }
    if family in GRANITE_MOE:
        return _granite_moe(prefix, sizes)
    if not is_moe:
        return gated(mlp, sizes.ffn, usual)
    place = prefix + "block_sparse_moe." if family == "mixtral" else mlp
    names = ("w1", "w3", "w2") if family == "mixtral" else usual
    found = {place + "gate.weight": (sizes.experts, hidden)}
    for expert in range(sizes.experts):
        found |= gated(f"{place}experts.{expert}.", sizes.expert_width, names)
    if family == "qwen2_moe":
        found |= gated(mlp + "shared_expert.", sizes.shared, usual)
        found[mlp + "shared_expert_gate.weight"] = (1, hidden)
    if family == "glm4_moe":
        found |= gated(mlp + "shared_experts.", sizes.shared, usual)
        found[mlp + "gate.e_score_correction_bias"] = (sizes.experts,)
    return found


def _granite_moe(prefix: str, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    hidden, ffn, place = sizes.hidden, sizes.ffn, prefix + "block_sparse_moe."
    found: dict[str, tuple[int, ...]] = {
        place + "router.layer.weight": (sizes.experts, hidden),
        place + "input_linear.weight": (sizes.experts, 2 * ffn, hidden),
        place + "output_linear.weight": (sizes.experts, hidden, ffn),
    }
    if sizes.shared:
        found[prefix + "shared_mlp.input_linear.weight"] = (2 * sizes.shared, hidden)
        found[prefix + "shared_mlp.output_linear.weight"] = (hidden, sizes.shared)
    return found
