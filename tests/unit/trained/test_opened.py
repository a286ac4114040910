"""A trained model under Megatron's names, whatever format it is in."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.trained.export import export
from nemo_upcycle.trained.opened import Trained, open_trained
from tests.megatron_checkpoints import save_nemo, tensors
from tests.moe_checkpoints import KINDS, moe_weights, save_moe

WEIGHTS = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def read(trained: Trained, parameter: str) -> torch.Tensor:
    """Read a parameter of Megatron's out of the tensors that it is made of."""
    parts = []
    for name, start, stop in trained.segments(parameter):
        info = trained.checkpoint.tensors[name]
        values = torch.empty((stop - start, *info.shape[1:]), dtype=DTYPES[info.dtype])
        buffer = memoryview(values.view(-1).view(torch.uint8).numpy())
        trained.checkpoint.read_into(buffer, name, (start, stop), None)
        parts.append(values)
    return torch.cat(parts)


@pytest.mark.parametrize("name", KINDS)
def test_both_formats_have_the_same_parameters(tmp_path: Path, name: str) -> None:
    kind, weights = KINDS[name], moe_weights(KINDS[name])
    source = save_moe(tmp_path / "saved", kind, weights)
    export(source, tmp_path / "hf")
    megatron, huggingface = open_trained(source), open_trained(tmp_path / "hf")
    assert megatron.family is None
    assert huggingface.family is not None
    assert huggingface.family.model_type == kind.model_type
    assert (megatron.dtype, huggingface.dtype) == ("F32", "F32")
    for parameter, values in weights.items():
        for opened in (megatron, huggingface):
            assert torch.equal(read(opened, parameter), values), parameter


@pytest.mark.parametrize("name", KINDS)
def test_both_formats_say_the_same_of_the_model(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    source = save_moe(tmp_path / "saved", kind, moe_weights(kind))
    export(source, tmp_path / "hf")
    model = open_trained(source).model
    if kind.model_type == "mixtral":  # whose config has no width but the experts'
        model = replace(model, arch=replace(model.arch, ffn_hidden_size=kind.width))
    assert open_trained(tmp_path / "hf").model == model


def test_a_dense_model_of_megatrons_has_no_experts(tmp_path: Path) -> None:
    trained = open_trained(save_nemo(tmp_path / "dense", tensors()))
    assert not any(trained.model.is_moe)
    assert not trained.unread


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A Qwen2-MoE with a shared expert."""
    kind = KINDS["partly dense, shared expert"]
    export(save_moe(tmp_path / "saved", kind, moe_weights(kind)), tmp_path / "hf")
    return tmp_path / "hf"


def rewrite(directory: Path, **changed: torch.Tensor | None) -> None:
    """Change or remove tensors, named by their ends."""
    found = load_file(directory / WEIGHTS)
    for end, values in changed.items():
        (name,) = (name for name in found if name.endswith(end.replace("__", ".")))
        found[name] = values if values is not None else found[name]
        if values is None:
            del found[name]
    save_file(found, directory / WEIGHTS, {"format": "pt"})


def test_a_gate_of_the_shared_expert_that_is_not_0_is_refused(exported: Path) -> None:
    rewrite(exported, shared_expert_gate__weight=torch.ones(1, 8))
    with pytest.raises(UpcyclingError, match=r"shared_expert_gate\.weight of .* is not 0"):
        open_trained(exported)


def test_a_gate_that_is_not_there_is_named(exported: Path) -> None:
    rewrite(exported, shared_expert_gate__weight=None)
    with pytest.raises(UpcyclingError, match=r"shared_expert_gate\.weight \[\]; expected \[1, 8\]"):
        open_trained(exported)


def test_a_tensor_of_another_shape_is_named(exported: Path) -> None:
    rewrite(exported, experts__3__down_proj__weight=torch.zeros(8, 13))
    with pytest.raises(UpcyclingError, match=r"1 tensors of the wrong shape: .*is \[8, 13\]"):
        open_trained(exported)


def test_a_tensor_that_is_missing_is_named_by_who_asks(exported: Path) -> None:
    rewrite(exported, experts__3__down_proj__weight=None)
    trained = open_trained(exported)
    with pytest.raises(UpcyclingError, match=r"has no .*experts\.3\.down_proj.* is incomplete"):
        trained.segments("decoder.layers.1.mlp.experts.3.linear_fc2.weight")


def test_a_parameter_that_the_architecture_has_not(exported: Path) -> None:
    trained = open_trained(exported)
    with pytest.raises(UpcyclingError, match="which does not exist in a qwen2_moe"):
        trained.segments("decoder.layers.1.self_attention.q_layernorm.weight")


def test_what_must_be_0_is_nothing_of_megatrons(exported: Path) -> None:
    assert open_trained(exported).unread == {"model.layers.1.mlp.shared_expert_gate.weight"}


def test_a_config_of_another_width_is_refused(exported: Path) -> None:
    path = exported / "config.json"
    config = json.loads(path.read_text())
    width = config["intermediate_size"]
    for size, said in ((width + 1, "expected at most the dense layer's width"), (7, "wrong shape")):
        path.write_text(json.dumps(config | {"shared_expert_intermediate_size": size}))
        with pytest.raises(UpcyclingError, match=said):
            open_trained(exported)
