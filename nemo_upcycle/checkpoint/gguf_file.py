"""A GGUF file as a dense checkpoint, for Llamas and Qwens, if the package `gguf` is installed.

transformers is the measure of what the file means: its own reader gives the config, and names,
order of rows and values are those of the model that it loads with `gguf_file=`. What that reader
leaves out although the model depends on it, such as RoPE scaling, is refused by name. Quantized
tensors are dequantized by `gguf` itself, to fp32, a strip of rows at a time.

Sources: transformers, `modeling_gguf_pytorch_utils.py`; the GGUF specification of ggml.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.checkpoint.dense import STRIP, DenseCheckpoint, Piece, Span, TensorInfo
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.checkpoint.gguf_header import Listed, Placed, read_header
from nemo_upcycle.errors import UpcyclingError, listing

if TYPE_CHECKING:  # plans need no numpy
    import numpy as np

    _Numbers = np.ndarray[Any, Any]

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Values of `general.architecture` that are read. llama.cpp calls a Mistral a llama too."""

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Keys of config.json by keys of the architecture."""

_TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.unknown_token_id": "unk_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_WIDTHS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
"""Keys that say the width of a head, all of it rotated."""

_IDLE = ("tensor_data_layout", "vocab_size")
"""Keys that say nothing more; the first is that of old Llamas."""

_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"}
"""safetensors' names of the types that need no dequantizing."""


def gguf_in(directory: Path) -> Path | None:
    """Return a directory's GGUF file if the file is the model; None otherwise.

    Raises:
        UpcyclingError: There are several.
    """
    files = sorted(directory.glob("*.gguf")) if find_spec("gguf") else []
    if not files or (directory / "config.json").exists():
        return None
    if len(files) > 1:
        raise UpcyclingError(
            f"{directory} holds several GGUF files ({listing([path.name for path in files])}); "
            "expected one. Link the one that is meant into a directory of its own; join parts of "
            "one model with `llama-gguf-split --merge` first."
        )
    return files[0]


class GGUFCheckpoint(DenseCheckpoint):
    """A dense checkpoint in a GGUF file.

    Args:
        path: The file.

    Raises:
        UpcyclingError: The file is damaged, or of an architecture that is not read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.directory, self.file = path.parent, path.name
        self._fields, self._placed = read_header(path)
        self._check_architecture()
        self.config = self._config()
        self._check_metadata()

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by transformers' names."""
        return {name: _info(placed) for name, (placed, _) in self._entries.items()}

    def pieces(self, name: str) -> tuple[Piece]:
        """Return a tensor's only rectangle, with blocks of the type as columns."""
        placed = self._entries[name][0]
        columns = placed.shape[1] // placed.block[1] if len(placed.shape) > 1 else 1
        return (Piece(self.file, placed.start, (0, placed.shape[0]), (0, columns)),)

    def read_into(self, buffer: memoryview, name: str, rows: Span, columns: Span | None) -> None:
        """Read a block of a tensor, dequantized; see `DenseCheckpoint.read_into`."""
        (placed, heads), info = self._entries[name], self.tensors[name]
        first, last = columns or (0, info.width)
        if info.packed is None and not heads:
            self.read_stored(buffer, self.pieces(name), placed.block[0], rows, (first, last))
            return
        import numpy as np
        import torch

        target = torch.frombuffer(buffer, dtype=torch_dtype(info.dtype)).view(-1, last - first)
        order = _order(info.shape[0], heads)[slice(*rows)] if heads else np.arange(*rows)
        step = max(1, STRIP // (last - first))
        for start in range(0, len(order), step):
            strip = self._strip(name, placed, order[start : start + step], (first, last))
            target[start : start + step] = torch.from_numpy(strip)

    def _strip(self, name: str, placed: Placed, rows: "_Numbers", columns: Span) -> "_Numbers":
        """Return rows of the file, dequantized to fp32."""
        import numpy as np
        from gguf import GGMLQuantizationType, dequantize

        size, values = placed.block
        blocks = columns[0] // values, -(-columns[1] // values)
        raw = np.empty((len(rows), (blocks[1] - blocks[0]) * size), np.uint8)
        breaks = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows)]
        for start, stop in pairwise(breaks):
            span = int(rows[start]), int(rows[stop - 1]) + 1
            part = raw[start:stop].reshape(-1).data
            self.read_stored(part, self.pieces(name), size, span, blocks)
        found: _Numbers = dequantize(raw, GGMLQuantizationType[placed.kind])
        skipped = columns[0] - blocks[0] * values
        return found[:, skipped : skipped + columns[1] - columns[0]]

    @cached_property
    def _entries(self) -> dict[str, tuple[Placed, int]]:
        """Each tensor's place, and the heads whose rows llama.cpp interleaves; 0 for none."""
        entries = {}
        for name, placed in self._placed.items():
            if placed.kind not in _PLAIN and not _is_dequantized(placed.kind):
                raise self._error(f"{name} is in {placed.kind}, which gguf does not dequantize")
            heads = self._heads(name)
            if heads and placed.shape[0] % (2 * heads):
                raise self._error(f"{name} is {list(placed.shape)}, with {heads} heads")
            entries[_name(name)] = placed, heads
        return entries

    def _heads(self, name: str) -> int:
        if self._architecture != "llama" or not re.search(r"\.attn_[qk]\.(weight|bias)$", name):
            return 0
        arch = self.architecture
        return arch.num_attention_heads if ".attn_q." in name else arch.num_query_groups

    @property
    def _architecture(self) -> str:
        return str(self._fields.get("general.architecture"))

    def _check_architecture(self) -> None:
        if self._architecture not in ARCHITECTURES:
            raise self._error(
                f"general.architecture is {self._architecture!r}; expected one of "
                f"{', '.join(ARCHITECTURES)}"
            )

    def _config(self) -> dict[str, Any]:
        """Return the config that transformers makes of the metadata."""
        arch = self._architecture
        names = {f"{arch}.{theirs}": ours for theirs, ours in _CONFIG.items()} | _TOKENS
        said = {ours: self._fields[key] for key, ours in names.items() if key in self._fields}
        tokens = self._fields.get("tokenizer.ggml.tokens")
        if "vocab_size" not in said and isinstance(tokens, Listed):
            said["vocab_size"] = tokens.length
        mistral = arch == "llama" and self._fields.get("general.name") == "mistral"
        key = "rope.dimension_count" if arch == "llama" else "attention.key_length"
        if (width := self._fields.get(f"{arch}.{key}")) is not None:
            said["head_dim"] = width
        return {
            "model_type": "mistral" if mistral else arch,
            "tie_word_embeddings": "output.weight" not in self._placed,
            **said,
        }

    def _check_metadata(self) -> None:
        """Check that nothing is said that changes the model and that transformers leaves out.

        Raises:
            UpcyclingError: Something is.
        """
        prefix = f"{self._architecture}."
        said = {
            key.removeprefix(prefix): value
            for key, value in self._fields.items()
            if key.startswith(prefix)
        }
        width = self.architecture.kv_channels
        wrong = [
            f"{prefix}{key}={value!r}"
            for key, value in said.items()
            if (key not in (*_CONFIG, *_WIDTHS, *_IDLE) and value not in (0, "none"))
            or (key in _WIDTHS and value != width)
        ]
        if (parts := self._fields.get("split.count", 1)) not in (0, 1):
            raise self._error(f"it is one of {parts} parts; `llama-gguf-split --merge` joins them")
        if "rope_freqs.weight" in self._placed:
            wrong.append("RoPE scaling as a tensor (rope_freqs.weight)")
        if wrong:
            raise self._error(
                f"it has {listing(wrong)}, which transformers does not read from GGUF"
            )

    def _error(self, what: str) -> UpcyclingError:
        return UpcyclingError(
            f"{self.directory / self.file} cannot be read as GGUF, llama.cpp's format: {what}. "
            "Get the model's original weights, with config.json and *.safetensors."
        )


def _name(name: str) -> str:
    """Return transformers' name of a tensor; an unknown one stays, and is reported as unknown."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found and found[2] in _LAYER:
        return f"model.layers.{found[1]}.{_LAYER[found[2]]}.{found[3]}"
    return _OUTSIDE.get(name, name)


def _order(count: int, heads: int) -> "_Numbers":
    """Return the file's row for each of transformers' rows.

    llama.cpp rotates neighboring rows, transformers rows half a head apart.
    """
    import numpy as np

    return np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _info(placed: Placed) -> TensorInfo:
    packed = None if placed.kind in _PLAIN else placed.block
    return TensorInfo(placed.shape, _PLAIN.get(placed.kind, "F32"), packed=packed)


def _is_dequantized(kind: str) -> bool:
    """Return whether gguf dequantizes a type."""
    from gguf import GGMLQuantizationType, quants

    return GGMLQuantizationType[kind] in quants._type_traits
