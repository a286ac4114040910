"""Checks of a dense checkpoint's tensors against the config, by headers alone."""

import re
from collections.abc import Collection, Mapping

from nemo_upcycle.checkpoint.dense import DTYPE_BYTES, TensorInfo
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.families import Architecture, Family

_BUFFERS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)(\w*attn|attention)\.(masked_)?bias$"
    r"|(^|\.)masked_bias$|(^|\.)position_ids$"
)
"""Tensors that old versions of transformers saved although the config determines them: RoPE tables,
causal masks, positions. transformers lists them in `_keys_to_ignore_on_load_unexpected`."""


def check_tensors(
    tensors: Mapping[str, TensorInfo], family: Family, arch: Architecture, where: str
) -> None:
    """Check a dense checkpoint's tensors against the config.

    Raises:
        UpcyclingError: A tensor is missing, left over, empty, of the wrong shape or dtype.
    """
    expected = family.shapes(arch)
    missing = [name for name in expected if name not in tensors]
    known = dict(expected)
    if arch.share_embeddings_and_output_weights and family.tied:
        output, embeddings = family.tied  # the output layer is the embeddings, even if not stored
        known[output] = expected[embeddings]
    extra = [name for name in tensors if name not in known and not _is_ignored(name, family)]
    there = {name: tensors[name] for name in known if name in tensors}
    empty = [f"{name} is {list(info.shape)}" for name, info in there.items() if 0 in info.shape]
    shapes = [
        f"{name} is {list(info.shape)}, expected {list(known[name])}"
        for name, info in there.items()
        if info.shape != known[name] and 0 not in info.shape
    ]
    dtypes = [
        f"{name} is {info.dtype}" for name, info in there.items() if info.dtype not in DTYPE_BYTES
    ]
    problems = [
        f"{len(found)} {what}: {listing(found)}"
        for what, found in (
            ("missing", missing),
            ("not known", extra),
            ("empty", empty),
            ("of the wrong shape", shapes),
            (f"of a dtype other than {', '.join(DTYPE_BYTES)}", dtypes),
        )
        if found
    ]
    if problems:
        raise UpcyclingError(
            f"The tensors of {where} do not fit its config ({family.model_type}, "
            f"{arch.num_layers} layers): {'; '.join(problems)}. "
            f"{_way_out(missing, extra, empty, known)}"
        )


def _is_ignored(name: str, family: Family) -> bool:
    return name.endswith(family.ignored) or _BUFFERS.search(name) is not None


def _way_out(
    missing: Collection[str], extra: Collection[str], empty: object, known: Collection[str]
) -> str:
    """Return what to do, by the cause if it can be recognized."""
    if empty:
        return (
            "DeepSpeed ZeRO-3 left these tensors on other ranks: save the model with "
            "stage3_gather_16bit_weights_on_model_save, or combine the parts with zero_to_fp32.py."
        )
    first = next(iter(known))
    for prefix in {name.removesuffix(first) for name in extra if name.endswith(first)} - {""}:
        if all(name.startswith(prefix) and name.removeprefix(prefix) in known for name in extra):
            return (
                f"All names begin with {prefix!r}. transformers does not read such names either, "
                "but draws random weights. Save the model from inside its wrapper."
            )
    if set(missing) == {"lm_head.weight"} and not extra:
        return (
            "AutoModel saves a model without the output layer: save the model with "
            "AutoModelForCausalLM, or set tie_word_embeddings to true if the embeddings are tied."
        )
    return "Use a complete checkpoint with the matching config."
