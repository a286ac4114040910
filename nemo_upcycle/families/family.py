"""The declaration of a family of dense models: config, tensors, and their map to Megatron's.

A Megatron parameter is described as rows of dense tensors, one after another. Tensor and expert
parallelism cut through these rows and do not appear here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

Neurons = tuple[int, int]
"""Start and stop of neurons of a feed-forward layer: row i of gate and of up, column i of down."""


@dataclass(frozen=True)
class Activation:
    """A kind of feed-forward layer.

    Without a gate only squared ReLU fits: `UpcyclingConfig.scales` relies on its degree of 2.
    With a gate any function does: a neuron is linear in up and in down.

    Attributes:
        is_gated: Whether a neuron has a gate.
        function: Megatron's name of the function.
        words: transformers' names of the function, the usual one first.
    """

    is_gated: bool
    function: str
    words: tuple[str, ...]


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(True, "silu", ("silu", "swish")),
    "geglu": Activation(True, "gelu_tanh", ("gelu_pytorch_tanh",)),
    "squared_relu": Activation(False, "squared_relu", ("relu2",)),
}
"""All kinds of feed-forward layers that can be upcycled."""


OF_GRANITE = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
"""Fields of an architecture, of this package's configs, and of a Granite's config.json."""

MULTIPLIERS = (*OF_GRANITE, "rounded_embedding_multiplier")
"""The same, and a Gemma's, which its config.json does not say."""


@dataclass(frozen=True)
class Architecture:
    """The architecture of a dense model, with Megatron's names.

    Attributes:
        rope_scaling: RoPE scaling of Llama 3.1 or YaRN with Hugging Face's names, see
            `families.rope`.
        activation: A key of `ACTIVATIONS`.
        normalization: `RMSNorm`, or `LayerNorm`, which has a bias; `1p` after it means that 1 is
            added to the weight.
        sliding_window: Tokens that a token attends to, including itself; None for all before it.
        nope_layers: Layers without RoPE.
        embedding_multiplier: The factor of the embeddings.
        residual_multiplier: The factor of what attention and feed-forward add to the residual.
        attention_multiplier: The factor of the attention's scores; None for 1/√width of a head.
        logits_scaling: The divisor of the logits.
        rounded_embedding_multiplier: A factor of the embeddings that is rounded to their dtype, as
            in Gemma.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: Mapping[str, Any] | None
    share_embeddings_and_output_weights: bool
    init_method_std: float
    activation: str = "swiglu"
    normalization: str = "RMSNorm"
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    rotary_percent: float = 1.0
    seq_len_interpolation_factor: float | None = None
    sliding_window: int | None = None
    nope_layers: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    rounded_embedding_multiplier: float = 1.0

    @property
    def gated_linear_unit(self) -> bool:
        """Whether a neuron has a gate."""
        return ACTIVATIONS[self.activation].is_gated

    @property
    def multipliers(self) -> dict[str, float]:
        """Factors that Megatron's configs have no field for, by name."""
        return {name: getattr(self, name) for name in MULTIPLIERS}

    @property
    def is_multiplied(self) -> bool:
        """Whether any multiplier, of the scores too, changes what a Llama computes."""
        return self.attention_multiplier is not None or {*self.multipliers.values()} != {1.0}

    @property
    def softmax_scale(self) -> float | None:
        """The factor of the attention's scores in Megatron; None for 1/√width of a head.

        YaRN multiplies queries and keys by its attention factor, so the scores by its square.
        """
        factor = (self.rope_scaling or {}).get("attention_factor", 1.0)
        if factor == 1:
            return self.attention_multiplier
        return factor**2 * (self.attention_multiplier or self.kv_channels**-0.5)

    @property
    def norm_has_bias(self) -> bool:
        """Whether norms have a bias."""
        return self.normalization.startswith("LayerNorm")

    @property
    def fc1_rows(self) -> int:
        """Rows of Megatron's linear_fc1 per neuron: 2 with a gate, else 1."""
        return 2 if self.gated_linear_unit else 1


@dataclass(frozen=True)
class Rows:
    """Rows start to stop of a dense tensor; a stop of None means to the end."""

    tensor: str
    start: int = 0
    stop: int | None = None

    def span(self, count: int) -> tuple[int, int]:
        """Return start and stop for a tensor with `count` rows."""
        return self.start, count if self.stop is None else self.stop


class Operation(Protocol):
    """Where the rows of a Megatron parameter come from; `{layer}` in names stands for the layer."""

    columns_are_neurons: ClassVar[bool]

    def rows(self, arch: Architecture, neurons: Neurons | None = None) -> Iterator[Rows]:
        """Yield the dense rows in the parameter's order.

        Args:
            arch: The dense model's architecture.
            neurons: The feed-forward neurons of the parameter; None for all.
        """


@dataclass(frozen=True)
class Rename:
    """The dense tensor under another name."""

    columns_are_neurons: ClassVar[bool] = False
    tensor: str

    def rows(self, arch: Architecture, neurons: Neurons | None = None) -> Iterator[Rows]:
        yield Rows(self.tensor)


@dataclass(frozen=True)
class GatedMLP:
    """All rows of gate, then all rows of up (Megatron's linear_fc1)."""

    columns_are_neurons: ClassVar[bool] = False
    gate: str
    up: str

    def rows(self, arch: Architecture, neurons: Neurons | None = None) -> Iterator[Rows]:
        first, last = neurons or (0, arch.ffn_hidden_size)
        # In a fused tensor all of gate comes before all of up.
        skip = arch.ffn_hidden_size if self.gate == self.up else 0
        yield Rows(self.gate, first, last)
        yield Rows(self.up, skip + first, skip + last)


@dataclass(frozen=True)
class UpMLP:
    """The rows of up, in a layer without a gate."""

    columns_are_neurons: ClassVar[bool] = False
    up: str

    def rows(self, arch: Architecture, neurons: Neurons | None = None) -> Iterator[Rows]:
        yield Rows(self.up, *(neurons or (0, arch.ffn_hidden_size)))


@dataclass(frozen=True)
class DownMLP:
    """The columns of down (Megatron's linear_fc2)."""

    columns_are_neurons: ClassVar[bool] = True
    down: str

    def rows(self, arch: Architecture, neurons: Neurons | None = None) -> Iterator[Rows]:
        yield Rows(self.down)


@dataclass(frozen=True)
class QKV:
    """For every query group: its queries, its key, its value (Megatron's linear_qkv)."""

    columns_are_neurons: ClassVar[bool] = False
    query: str
    key: str
    value: str

    def rows(self, arch: Architecture, neurons: Neurons | None = None) -> Iterator[Rows]:
        head, groups = arch.kv_channels, arch.num_query_groups
        queries = head * (arch.num_attention_heads // groups)
        # In a fused tensor all queries come before all keys, and those before all values.
        keys = groups * queries if self.key == self.query else 0
        values = keys + groups * head if self.value == self.key else 0
        for group in range(groups):
            yield Rows(self.query, group * queries, (group + 1) * queries)
            yield Rows(self.key, keys + group * head, keys + (group + 1) * head)
            yield Rows(self.value, values + group * head, values + (group + 1) * head)


@dataclass(frozen=True)
class Family:
    """A family of dense models.

    Attributes:
        model_type: The family's name in `config.json`.
        architecture: Reads the architecture from a parsed `config.json`.
        parameters: Operations by dense Megatron parameter, with `{layer}` for repeated ones.
        tensors: The size of each dense tensor's axes as keys of `dimensions`, with `{layer}`
            for repeated tensors.
        ignored: Suffixes of tensor names that hold no weights.
        tied: The names of the output layer and of the embeddings, which are equal if tied.
    """

    model_type: str
    architecture: Callable[[Mapping[str, Any]], Architecture]
    parameters: Mapping[str, Operation]
    tensors: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...] = ()
    tied: tuple[str, str] | None = None

    def shapes(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the expected shape of every dense tensor, layers filled in."""
        size = dimensions(arch)
        names = dict(self.tensors)
        if arch.share_embeddings_and_output_weights and self.tied:
            names.pop(self.tied[0])
        result: dict[str, tuple[int, ...]] = {}
        for name, axes in names.items():
            shape = tuple(size[axis] for axis in axes)
            if not _is_there(name, arch):
                continue
            layers = range(arch.num_layers) if "{layer}" in name else range(1)
            result.update({name.format(layer=layer): shape for layer in layers})
        return result

    def feed_forward(self, arch: Architecture, layer: int) -> dict[str, Rows]:
        """Return where the parts of a dense feed-forward layer are: gate (if any), up, down."""
        fc1 = self.parameters["decoder.layers.{layer}.mlp.linear_fc1.weight"]
        fc2 = self.parameters["decoder.layers.{layer}.mlp.linear_fc2.weight"]
        *gate, up = fc1.rows(arch)
        parts = dict(zip(("up", "down", "gate"), (up, *fc2.rows(arch), *gate), strict=False))
        fill = partial(str.format, layer=layer)
        return {part: Rows(fill(r.tensor), r.start, r.stop) for part, r in parts.items()}


def _is_there(tensor: str, arch: Architecture) -> bool:
    """Return whether a model has a tensor that not all models of its family have."""
    if tensor.endswith(("_proj.bias", "linear_qkv.bias")):
        return arch.add_qkv_bias
    if tensor.endswith(("q_norm.weight", "k_norm.weight")):
        return arch.qk_layernorm
    return True


def dimensions(arch: Architecture) -> dict[str, int]:
    """Return the sizes of tensors' axes, by name."""
    queries = arch.num_attention_heads * arch.kv_channels
    keys = arch.num_query_groups * arch.kv_channels
    return {
        "vocab": arch.vocab_size,
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_hidden_size,
        "fc1": arch.fc1_rows * arch.ffn_hidden_size,
        "head": arch.kv_channels,
        "queries": queries,
        "keys": keys,
        "qkv": queries + 2 * keys,
    }
