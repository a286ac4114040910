"""What a family of dense models declares, and the operations it declares it with.

An operation says which rows of which dense tensors, one after another, make up the rows of one
Megatron parameter. That is all a plan needs: a shard's rows are cut out of that sequence. Columns
are the same on both sides.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Architecture:
    """The numbers of a dense model, under Megatron's names.

    `rope_scaling` is Llama 3.1's, in Hugging Face's words: factor, low_freq_factor,
    high_freq_factor, original_max_position_embeddings.
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
    rope_scaling: Mapping[str, float] | None
    share_embeddings_and_output_weights: bool
    init_method_std: float


@dataclass(frozen=True)
class Rows:
    """Rows start to stop of a dense tensor; stop None means all that follow."""

    tensor: str
    start: int = 0
    stop: int | None = None


class Operation(Protocol):
    """Where the rows of a Megatron parameter come from; `{layer}` in names stands for the layer."""

    def rows(self, arch: Architecture) -> Iterator[Rows]:
        """Yield the dense rows in the parameter's order."""


@dataclass(frozen=True)
class Rename:
    """The dense tensor under another name."""

    tensor: str

    def rows(self, arch: Architecture) -> Iterator[Rows]:
        yield Rows(self.tensor)


@dataclass(frozen=True)
class GatedMLP:
    """All rows of gate, then all rows of up (Megatron's linear_fc1)."""

    gate: str
    up: str

    def rows(self, arch: Architecture) -> Iterator[Rows]:
        yield Rows(self.gate, 0, arch.ffn_hidden_size)
        yield Rows(self.up, 0, arch.ffn_hidden_size)


@dataclass(frozen=True)
class QKV:
    """For every query group: its queries, its key, its value (Megatron's linear_qkv)."""

    query: str
    key: str
    value: str

    def rows(self, arch: Architecture) -> Iterator[Rows]:
        head = arch.kv_channels
        queries = head * (arch.num_attention_heads // arch.num_query_groups)
        for group in range(arch.num_query_groups):
            yield Rows(self.query, group * queries, (group + 1) * queries)
            yield Rows(self.key, group * head, (group + 1) * head)
            yield Rows(self.value, group * head, (group + 1) * head)


@dataclass(frozen=True)
class Family:
    """A family of dense models.

    Attributes:
        model_type: Its name in `config.json`.
        architecture: Makes the numbers out of a parsed `config.json`.
        parameters: Operation by dense Megatron parameter, `{layer}` where they repeat.
        shapes: Makes the expected shape of every dense tensor, `{layer}` filled in.
        ignored: Endings of tensor names that hold no weights.
        tied: The output layer, and the embeddings that it is where they are tied.
    """

    model_type: str
    architecture: Callable[[Mapping[str, Any]], Architecture]
    parameters: Mapping[str, Operation]
    shapes: Callable[[Architecture], dict[str, tuple[int, ...]]]
    ignored: tuple[str, ...] = ()
    tied: tuple[str, str] | None = None
