"""Which layers accumulate weight gradients themselves; Transformer Engine's layers as stand-ins."""

from types import SimpleNamespace

import torch

from nemo_upcycle.engine.fused_gradients import fuse_weight_gradients
from nemo_upcycle.nemo.fused_gradients import FusedWeightGradients


class Layer(torch.nn.Linear):
    """A layer with Transformer Engine's switch."""

    def __init__(self, buffers: bool = True) -> None:
        super().__init__(2, 2)
        self.fuse_wgrad_accumulation = False
        if buffers:
            for parameter in self.parameters():
                parameter.main_grad = torch.zeros_like(parameter)


def test_layers_of_transformer_engine_with_buffers_are_fused() -> None:
    fused, without, other = Layer(), Layer(buffers=False), torch.nn.Linear(2, 2)
    assert fuse_weight_gradients([torch.nn.Sequential(fused, without), other]) == 1
    assert fused.fuse_wgrad_accumulation
    assert not without.fuse_wgrad_accumulation
    assert not hasattr(other, "fuse_wgrad_accumulation")


def test_the_callback_fuses_all_virtual_stages() -> None:
    stages = [torch.nn.Sequential(Layer()), torch.nn.Sequential(Layer())]
    trainer = SimpleNamespace(strategy=SimpleNamespace(megatron_parallel=stages))
    FusedWeightGradients().on_train_start(trainer, stages[0])
    assert all(stage[0].fuse_wgrad_accumulation for stage in stages)
