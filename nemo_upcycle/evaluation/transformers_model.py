"""A Hugging Face directory as a model of transformers, on one rank, without random weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_upcycle.checkpoint import DenseCheckpoint, HuggingFaceCheckpoint, read_config
from nemo_upcycle.checkpoint.described import check_whole
from nemo_upcycle.checkpoint.fingerprint import check_tied
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.engine.loadable import open_loadable
from nemo_upcycle.engine.reading import Chunk, copy_blocks
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.evaluation.generation import transformers_config
from nemo_upcycle.families import FAMILIES
from nemo_upcycle.families.model import upcycling_of
from nemo_upcycle.families.moe_config import MOE_FAMILIES
from nemo_upcycle.plans.layout import shards
from nemo_upcycle.plans.rank import Block
from nemo_upcycle.trained.opened import open_trained
from nemo_upcycle.trained.restore import check_all_restored, plan_restore

try:  # transformers 5
    from transformers.initialization import no_init_weights
except ImportError:
    from transformers.modeling_utils import no_init_weights


def is_known(config: dict[str, Any]) -> bool:
    """Return whether a `config.json` belongs to a family that Megatron computes, dense or MoE."""
    return config.get("model_type") in (*FAMILIES, *MOE_FAMILIES)


def is_fused(config: dict[str, Any]) -> bool:
    """Return whether the installed transformers has other parameters than the directory's files.

    transformers 5 stacks a layer's experts in one parameter.
    """
    return transformers.__version__ >= "5" and config.get("model_type") in MOE_FAMILIES


def transformers_model(directory: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load a Hugging Face directory into transformers.

    Families that Megatron computes are read by this package: names, config and errors are the same
    on one rank as on several. Other families are read by transformers.

    Args:
        directory: The checkpoint.
        dtype: The parameters' dtype; None means the checkpoint's.

    Raises:
        UpcyclingError: A tensor is missing, superfluous, misshapen or not finite, or the config has
            an unsupported feature.
    """
    load = _known if is_known(read_config(directory)) else _other
    return load(directory, dtype)


def _known(directory: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    source, checkpoint = open_loadable(directory), HuggingFaceCheckpoint(directory)
    _check(checkpoint)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            transformers_config(directory), dtype=dtype or source.dtype, trust_remote_code=False
        )
    _fill(model, checkpoint)
    return model


def _check(checkpoint: HuggingFaceCheckpoint) -> None:
    """Check the tensors in the same way as on several ranks.

    Raises:
        UpcyclingError: The tensors do not match the config.
    """
    if checkpoint.config["model_type"] in FAMILIES:
        check_whole(checkpoint)
        check_tied(checkpoint)
        return
    trained = open_trained(checkpoint.directory)
    arch = trained.model.arch
    upcycling = upcycling_of(trained.model, arch.ffn_hidden_size)
    owned = shards(arch, upcycling, ParallelFolding(), world_size=1, rank=0)
    check_all_restored(trained, plan_restore(owned, trained).tensors)


def _fill(model: PreTrainedModel, checkpoint: HuggingFaceCheckpoint) -> None:
    """Read every parameter of the model."""
    model.tie_weights()  # skipped together with the initialization
    # A tied output layer shares the embeddings' parameter and is not listed.
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    fill_parameters(parameters, checkpoint)


def fill_parameters(parameters: Mapping[str, torch.Tensor], checkpoint: DenseCheckpoint) -> None:
    """Read parameters of a model of transformers.

    Args:
        parameters: The parameters, by name in the checkpoint.
        checkpoint: The checkpoint.

    Raises:
        UpcyclingError: A tensor is missing, misshapen or not finite.
    """
    infos = checkpoint.tensors
    lost = [
        f"{name} {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name not in infos or infos[name].shape != parameter.shape
    ]
    if lost:
        raise UpcyclingError(
            f"transformers' model of {checkpoint.directory} has {len(lost)} tensors that the "
            f"files have not: {listing(lost)}. Its config is another model's."
        )
    blocks = [
        Block(name, (0, info.shape[0]), (0, info.width) if len(info.shape) > 1 else None)
        for name, info in infos.items()
        if name in parameters
    ]

    def write(chunk: Chunk, values: torch.Tensor) -> None:
        parameters[chunk.block.tensor][chunk.rows[0] : chunk.rows[1]].copy_(values)

    for _ in copy_blocks(checkpoint, blocks, torch.device("cpu"), {}, write):
        pass
    checkpoint.close()


def _other(directory: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load a family that only transformers computes.

    Raises:
        UpcyclingError: transformers fails, or would leave weights random or unread.
    """
    config = transformers_config(directory)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # mismatches are reported below
            output_loading_info=True,
        )
    except Exception as error:  # raised by the code of any of some hundred families
        said = " ".join(str(error).split())
        raise UpcyclingError(
            f"transformers cannot load {directory}: {type(error).__name__}: {said}"
        ) from error
    misshapen = [
        f"{name} is {_shape(directory, name)}, expected {list(model.get_parameter(name).shape)}"
        for name in loading["mismatched_keys"]
    ]
    problems = [
        f"{len(found)} {what}: {listing(list(map(str, found)))}"
        for what, found in (
            ("missing", loading["missing_keys"]),
            ("not known", loading["unexpected_keys"]),
            ("of the wrong shape", misshapen),
        )
        if found
    ]
    if problems:
        raise UpcyclingError(
            f"The tensors of {directory} do not fit its config ({model.config.model_type}): "
            f"{'; '.join(problems)}. Use a complete checkpoint with its own config."
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UpcyclingError(
                f"Tensor {name} of {directory} holds NaN or Inf; expected finite weights. "
                "The checkpoint is damaged; get it again."
            )
    return model


def _shape(directory: Path, name: str) -> list[int] | None:
    """Return a tensor's shape in the files; the model's name may have an additional prefix."""
    tensors = HuggingFaceCheckpoint(directory).tensors
    shapes = (info.shape for file_name, info in tensors.items() if name.endswith(file_name))
    return list(next(shapes, ())) or None
