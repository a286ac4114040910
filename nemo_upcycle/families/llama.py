"""Llama 2, 3, 3.1, 3.2 and Code Llama (`LlamaForCausalLM`)."""

from functools import partial

from nemo_upcycle.families.family import QKV, DownMLP, Family, GatedMLP, Operation, Rename
from nemo_upcycle.families.huggingface import read_architecture

LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
MLP = LAYER + "mlp."
MEGATRON_LAYER = "decoder.layers.{layer}."

PARAMETERS: dict[str, Operation] = {
    "embedding.word_embeddings.weight": Rename("model.embed_tokens.weight"),
    MEGATRON_LAYER + "self_attention.linear_qkv.layer_norm_weight": Rename(
        LAYER + "input_layernorm.weight"
    ),
    MEGATRON_LAYER + "self_attention.linear_qkv.weight": QKV(
        ATTENTION + "q_proj.weight", ATTENTION + "k_proj.weight", ATTENTION + "v_proj.weight"
    ),
    MEGATRON_LAYER + "self_attention.linear_proj.weight": Rename(ATTENTION + "o_proj.weight"),
    MEGATRON_LAYER + "mlp.linear_fc1.layer_norm_weight": Rename(
        LAYER + "post_attention_layernorm.weight"
    ),
    MEGATRON_LAYER + "mlp.linear_fc1.weight": GatedMLP(
        MLP + "gate_proj.weight", MLP + "up_proj.weight"
    ),
    MEGATRON_LAYER + "mlp.linear_fc2.weight": DownMLP(MLP + "down_proj.weight"),
    "decoder.final_layernorm.weight": Rename("model.norm.weight"),
    "output_layer.weight": Rename("lm_head.weight"),
}

TENSORS: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("vocab", "hidden"),
    LAYER + "input_layernorm.weight": ("hidden",),
    LAYER + "post_attention_layernorm.weight": ("hidden",),
    ATTENTION + "q_proj.weight": ("queries", "hidden"),
    ATTENTION + "k_proj.weight": ("keys", "hidden"),
    ATTENTION + "v_proj.weight": ("keys", "hidden"),
    ATTENTION + "o_proj.weight": ("hidden", "queries"),
    MLP + "gate_proj.weight": ("ffn", "hidden"),
    MLP + "up_proj.weight": ("ffn", "hidden"),
    MLP + "down_proj.weight": ("hidden", "ffn"),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}

LLAMA = Family(
    model_type="llama",
    architecture=partial(read_architecture, family="llama"),
    parameters=PARAMETERS,
    tensors=TENSORS,
    ignored=("rotary_emb.inv_freq",),
    tied=("lm_head.weight", "model.embed_tokens.weight"),
)
