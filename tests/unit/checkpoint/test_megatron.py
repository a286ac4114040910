"""Megatron checkpoints: what is read, and what is refused."""

from pathlib import Path

import pytest
import torch

from nemo_upcycle.checkpoint import MegatronCheckpoint, open_checkpoint
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import family_of
from nemo_upcycle.plans.rank import Shard, make_plan
from tests.megatron_checkpoints import (
    HIDDEN,
    LAYER,
    LAYERS,
    VOCAB,
    architecture,
    read,
    save,
    save_nemo,
    tensors,
)


@pytest.mark.parametrize("axis", [0, -1])
def test_layers_come_apart_and_chunks_together(tmp_path: Path, axis: int) -> None:
    """Cut along the first axis, whole layers lie in one chunk."""
    stored = tensors()
    checkpoint = MegatronCheckpoint(save(tmp_path / "saved", stored, axis))
    for name, values in stored.items():
        if not name.startswith(LAYER):
            assert torch.equal(read(checkpoint, name), values)
            continue
        for layer in range(LAYERS):
            found = read(checkpoint, name.replace(LAYER, f"{LAYER}{layer}."))
            assert torch.equal(found, values[layer]), name
    assert len(checkpoint.tensors) == 3 + 6 * LAYERS


def test_bfloat16_is_read_as_it_is(tmp_path: Path) -> None:
    stored = {name: values.bfloat16() for name, values in tensors().items()}
    checkpoint = MegatronCheckpoint(save(tmp_path / "saved", stored))
    name = "output_layer.weight"
    assert torch.equal(read(checkpoint, name), stored[name])


def test_norms_that_are_not_fused_have_the_fused_names(tmp_path: Path) -> None:
    stored = tensors()
    norms = {
        LAYER + "self_attention.linear_qkv.layer_norm_weight": LAYER + "input_layernorm.weight",
        LAYER + "mlp.linear_fc1.layer_norm_weight": LAYER + "pre_mlp_layernorm.weight",
    }
    local = {norms.get(name, name): values for name, values in stored.items()}
    checkpoint = MegatronCheckpoint(save(tmp_path / "saved", local))
    for fused in norms:
        found = read(checkpoint, fused.replace(LAYER, f"{LAYER}1."))
        assert torch.equal(found, stored[fused][1])


def test_the_optimizer_is_left_out(tmp_path: Path) -> None:
    optimizer = {"optimizer.state.exp_avg.output_layer.weight": torch.zeros(4, 4)}
    optimizer["chained_0." + next(iter(optimizer))] = torch.zeros(4, 4)
    checkpoint = MegatronCheckpoint(save(tmp_path / "saved", tensors() | optimizer))
    assert not [name for name in checkpoint.tensors if "optimizer" in name]


def test_all_layouts_are_found(tmp_path: Path) -> None:
    iteration = save(tmp_path / "lm" / "iter_0000003", tensors())
    (tmp_path / "lm" / "latest_checkpointed_iteration.txt").write_text("3\n")
    nemo = save_nemo(tmp_path / "nemo", tensors())
    found = [architecture(d) for d in (iteration, tmp_path / "lm", nemo, nemo / "weights")]
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0] == found[2]
    assert found[0].rotary_base == 500000
    assert found[0].rope_scaling is None


def test_vocabulary_is_read_without_padding(tmp_path: Path) -> None:
    """NeMo records the real size or none; Megatron-LM's may lack special tokens."""
    recorded = save_nemo(tmp_path / "recorded", tensors(), vocab_size=VOCAB - 3)
    unknown = save_nemo(tmp_path / "unknown", tensors(), vocab_size=None)
    lm = save(tmp_path / "lm", tensors())
    sizes = [architecture(directory).vocab_size for directory in (recorded, unknown, lm)]
    assert sizes == [VOCAB - 3, VOCAB, VOCAB]
    checkpoint = MegatronCheckpoint(recorded)
    name = "embedding.word_embeddings.weight"
    assert torch.equal(read(checkpoint, name), tensors()[name][: VOCAB - 3])


def test_a_model_with_too_few_rows_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    checkpoint = MegatronCheckpoint(save(tmp_path / "saved", tensors()))
    family = family_of(checkpoint.config)
    arch = family.architecture(checkpoint.config)
    shape = (VOCAB - 1, HIDDEN)
    shard = Shard("embedding.word_embeddings.weight", shape, (0, 0), shape)
    with pytest.raises(UpcyclingError, match=r"has 15 rows, the dense checkpoint gives 16"):
        make_plan([shard], checkpoint.tensors, family, arch, UpcyclingConfig())


def test_an_moe_is_refused_by_its_tensors(tmp_path: Path) -> None:
    router = {LAYER + "mlp.router.weight": torch.zeros(LAYERS, 4, HIDDEN)}
    with pytest.raises(UpcyclingError, match=r"is an MoE already: it has .*router\.weight"):
        open_checkpoint(str(save(tmp_path / "saved", tensors() | router)))


def test_an_unfinished_checkpoint_is_refused(tmp_path: Path) -> None:
    nemo = save_nemo(tmp_path / "step=5-last", tensors())
    (tmp_path / "step=5-last-unfinished").touch()
    for directory in (nemo, nemo / "weights"):
        with pytest.raises(UpcyclingError, match="was not saved completely"):
            open_checkpoint(str(directory))


@pytest.mark.parametrize("content", ["12", "../../etc", ""])
def test_a_tracker_that_names_nothing_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    with pytest.raises(UpcyclingError, match="expected an iteration"):
        open_checkpoint(str(tmp_path))
