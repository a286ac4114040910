"""One layer of the dense model at a time, computed by transformers' own code.

A model of the family with a single layer is built and filled with a layer of the checkpoint. Its
`forward` computes masks and rotary embeddings as for the whole model, so that there is no second
implementation of the mathematics. Memory is that of one layer, whatever the model's size.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from nemo_upcycle.calibration.text import Tokens
from nemo_upcycle.checkpoint import DenseCheckpoint
from nemo_upcycle.checkpoint.branches import branch_name
from nemo_upcycle.checkpoint.dtypes import torch_dtype
from nemo_upcycle.checkpoint.huggingface import is_huggingface
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.generation import transformers_config
from nemo_upcycle.evaluation.transformers_model import fill_parameters, no_init_weights
from nemo_upcycle.families.huggingface import ROUNDED_ROOT

_LAYER = "layers.0."
_PER_LAYER = ("layer_types", "no_rope_layers")
"""Lists of a config with a value per layer."""
_EMBEDDINGS = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Seen:
    """What a layer computes for a sequence.

    Attributes:
        inputs: Inputs of the feed-forward layer, [tokens, hidden].
        neurons: Activations of the neurons, the inputs of down, [tokens, ffn].
        outputs: Outputs of the layer, [tokens, hidden].
    """

    inputs: torch.Tensor
    neurons: torch.Tensor
    outputs: torch.Tensor


class DenseLayer:
    """A layer of a dense model, in fp32.

    Args:
        checkpoint: The dense checkpoint; see `check_computable`.
        layer: The layer, from 0.
        branch: Of several dense checkpoints, the one whose feed-forward layer is taken; all other
            weights are the averages that the upcycled model has.
        device: Where to compute.

    Raises:
        UpcyclingError: transformers' layer has other tensors than the checkpoint.
    """

    def __init__(
        self, checkpoint: DenseCheckpoint, layer: int, branch: int, device: torch.device
    ) -> None:
        config = transformers_config(checkpoint.branches[0].directory)
        self._model = _model_of_one_layer(config, layer)
        _fill(self._model, checkpoint, layer, branch)
        self._model.to(device).eval()
        self._device = device
        self._layer = self._model.layers[0]

    @torch.inference_mode()
    def compute(self, hidden: torch.Tensor) -> Seen:
        """Compute a sequence.

        Args:
            hidden: Inputs of the layer, [tokens, hidden].
        """
        with _inputs(self._layer.mlp) as ffn, _inputs(self._layer.mlp.down_proj) as down:
            batch = hidden.to(self._device)[None]
            outputs = self._model(inputs_embeds=batch, use_cache=False).last_hidden_state
        return Seen(ffn[0][0], down[0][0], outputs[0])

    def gram(self) -> torch.Tensor:
        """Return WᵀW of the stacked weights that read the layer's inputs, [hidden, hidden], fp64.

        They are gate and up: all linear layers of the feed-forward layer but down.
        """
        down = self._layer.mlp.down_proj
        linear = [each for each in self._layer.mlp.modules() if isinstance(each, torch.nn.Linear)]
        weights = [each.weight.detach().double() for each in linear if each is not down]
        return sum((each.T @ each for each in weights[1:]), weights[0].T @ weights[0])


@contextmanager
def _inputs(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Give the inputs that a module is called with meanwhile."""
    found: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        yield found
    finally:
        hook.remove()


def check_computable(checkpoint: DenseCheckpoint) -> None:
    """Check that layers of a checkpoint can be computed.

    Raises:
        UpcyclingError: The checkpoint is in another format than Hugging Face's, or transformers'
            layer of the family is built otherwise.
    """
    for branch in checkpoint.branches:
        if not is_huggingface(branch.directory):
            raise UpcyclingError(
                f"{branch.directory} is no Hugging Face directory; expected one, because "
                "transformers computes the layers. Write it as one first: "
                "nemo llm export path=DIR target=hf output_path=OUT."
            )
    model = _model_of_one_layer(transformers_config(checkpoint.branches[0].directory), 0)
    names = {name for name, _ in model.named_parameters()}
    modules = dict(model.named_modules())
    missing = [each for each in ("layers.0.mlp.down_proj", "norm") if each not in modules]
    unknown = [name for name in names if _stored(name, 0) not in checkpoint.tensors]
    if missing or unknown:
        what = f"no module {missing[0]}" if missing else f"tensors unlike the files: {unknown[0]}"
        raise UpcyclingError(
            f"calibrate cannot compute the layers of model_type={checkpoint.config['model_type']!r}"
            f" with transformers {transformers.__version__}: {what}."
        )


def embeddings(checkpoint: DenseCheckpoint, tokens: Tokens) -> torch.Tensor:
    """Return the inputs of the first layer in fp32, [tokens, hidden]; no other rows are read.

    Raises:
        UpcyclingError: A token has no row.
    """
    info = checkpoint.tensors[_EMBEDDINGS]
    rows, places = torch.from_numpy(tokens).unique(return_inverse=True)
    if len(rows) and int(rows[-1]) >= info.shape[0]:
        raise UpcyclingError(
            f"The tokenizer gives token {int(rows[-1])}, and {checkpoint.directory} has embeddings "
            f"of {info.shape[0]} tokens. Give the model's own tokenizer with --tokenizer."
        )
    values = torch.empty((len(rows), info.width), dtype=torch_dtype(info.dtype))
    for place, row in enumerate(rows.tolist()):
        raw = memoryview(values[place].view(torch.uint8).numpy())
        checkpoint.read_into(raw, _EMBEDDINGS, (row, row + 1), None)
    arch = checkpoint.architecture
    factor = arch.embedding_multiplier * arch.rounded_embedding_multiplier
    return values.float()[places] * factor


def _model_of_one_layer(config: PretrainedConfig, layer: int) -> PreTrainedModel:
    """Build a model with room for one layer of the dense model and nothing else."""
    config = copy.deepcopy(config)
    for name in _PER_LAYER:
        if values := getattr(config, name, None):
            setattr(config, name, [values[layer]])
    if hasattr(config, "embedding_multiplier"):
        config.embedding_multiplier = 1.0  # `embeddings` multiplies
    config.num_hidden_layers = 1
    config.vocab_size = 1
    config.pad_token_id = None
    with no_init_weights():
        model = AutoModel.from_config(config, dtype=torch.float32)
    if config.model_type in ROUNDED_ROOT:
        model.config.hidden_size = 1  # by whose root transformers 4 multiplies the inputs
    model.embed_tokens = None
    model.norm = torch.nn.Identity()
    return model


def _stored(name: str, layer: int) -> str:
    """Return the name of a layer's parameter in the checkpoint."""
    return f"model.layers.{layer}.{name.removeprefix(_LAYER)}"


def _fill(model: PreTrainedModel, checkpoint: DenseCheckpoint, layer: int, branch: int) -> None:
    own = checkpoint.family.feed_forward(checkpoint.architecture, layer).values()
    of_branch = {rows.tensor for rows in own} if len(checkpoint.branches) > 1 else set()
    parameters = {}
    for name, parameter in model.named_parameters():
        stored = _stored(name, layer)
        chosen = branch_name(branch, stored) if stored in of_branch else stored
        parameters[chosen] = parameter.detach()
    fill_parameters(parameters, checkpoint)
