"""Megatron's optimizer with a part of its state on the host: bytes, steps, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.config import OptimizerStorage, ParallelFolding, UpcyclingConfig
from nemo_upcycle.planner.memory import model_state
from nemo_upcycle.planner.optimizer import HOST_BYTES, held
from nemo_upcycle.planner.workload import Mapping, Workload
from tests.distributed.foldings import spread
from tests.distributed.pool import RankPool
from tests.tiny import wide_architecture

E8T2 = UpcyclingConfig()
STEPS = 3


def offloaded(fraction: float, in_fp32: bool = True) -> OptimizerStorage:
    return OptimizerStorage(optimizer_offload_fraction=fraction, grad_reduce_in_fp32=in_fp32)


class Run:
    """A model in bf16 with Megatron's DDP and optimizer, on one GPU of a made-up machine."""

    def __init__(self, folding: ParallelFolding, storage: OptimizerStorage, seed: int = 1) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.utils import get_model_config
        from nemo_upcycle_recipes.components import stored

        from nemo_upcycle.engine.offloaded_optimizer import prepare_offloaded
        from tests.distributed import scenarios

        bf16 = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}
        self.chunks = [
            chunk.bfloat16()
            for chunk in scenarios.build_from(wide_architecture(), folding, E8T2, **bf16)
        ]
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=storage.grad_reduce_in_fp32, use_distributed_optimizer=True
        )
        self.models = [
            DistributedDataParallel(get_model_config(chunk), ddp, chunk) for chunk in self.chunks
        ]
        config = OptimizerConfig(
            lr=1e-3, bf16=True, use_distributed_optimizer=True, **stored(storage)
        )
        self.optimizer = get_megatron_optimizer(config, self.models)
        threads = torch.get_num_threads()
        prepare_offloaded(self.optimizer, ranks_of_node=1)
        torch.set_num_threads(threads)
        self.parts = self.optimizer.chained_optimizers

    def parameters(self) -> list[torch.Tensor]:
        return [p for model in self.models for p in model.parameters()]

    def step(self, number: int) -> None:
        """Step with gradients that the number decides, as after a backward pass."""
        for index, parameter in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(1000 * number + index)
            parameter.main_grad.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            )
        for model in self.models:
            model.finish_grad_sync()
        assert self.optimizer.step()[0]
        self.optimizer.zero_grad()

    def sharded(self, is_loading: bool) -> dict[str, Any]:
        """Return model and optimizer as NeMo asks for them with the recipes' settings."""
        from tests.distributed.scenarios import _sharded_state

        model = _sharded_state(self.chunks)
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True,
            "chained_optim_avoid_prefix": True,
        }
        optimizer = self.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)
        return {**model, "optimizer": optimizer}


def bytes_of(tensors: Any) -> int:
    different = {id(t): t for t in tensors if isinstance(t, torch.Tensor) and t.dim()}
    return sum(t.numel() * t.element_size() for t in different.values())


def weigh(folding: ParallelFolding, storage: OptimizerStorage) -> tuple[int, int, int, int]:
    """Make a step; return bytes of gradients, of state on GPU and host, and the largest part."""
    from tests.distributed.two_processors import gpu_and_host

    with gpu_and_host() as processors:
        run = Run(folding, storage)
        run.step(1)
        buffers = [b for m in run.models for b in (*m.buffers, *m.expert_parallel_buffers)]
        grads = sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers)
        state: list[torch.Tensor] = []
        largest = 0
        for part in run.parts:
            for inner in part.optimizer.sub_optimizers:
                for parameter, moments in inner.state.items():
                    state += [parameter, moments["exp_avg"], moments["exp_avg_sq"]]
                    # In fp32 a GPU parameter's gradient is a view of Megatron's buffer.
                    if processors.is_on_host(parameter) or not storage.grad_reduce_in_fp32:
                        state.append(parameter.grad)
                    largest = max(largest, parameter.numel())
        host = [tensor for tensor in state if processors.is_on_host(tensor)]
        gpu = [tensor for tensor in state if not processors.is_on_host(tensor)]
        return grads, bytes_of(gpu), bytes_of(host), largest


@pytest.mark.parametrize(
    ("spread_", "storage"),
    [
        (spread(1), offloaded(0.5)),
        (spread(2, ep=2), offloaded(0.75)),
        (spread(2), offloaded(1.0)),
        (spread(2, pp=2), offloaded(0.25, in_fp32=False)),
    ],
)
def test_predicted_bytes_are_real(ranks: RankPool, spread_: Any, storage: OptimizerStorage) -> None:
    folding, world_size = spread_.folding, spread_.world_size
    workload = Workload(wide_architecture(), E8T2, 32, 4, optimizer=storage)
    mapping = Mapping(folding, world_size)
    measured = ranks.run(weigh, world_size, folding=folding, storage=storage)
    for rank, (gradients, gpu, host, largest) in enumerate(measured):
        said = model_state(
            workload, mapping, rank if spread_.folding.pipeline_model_parallel_size > 1 else 0
        )
        assert said.gradients == gradients
        # Whole parameters are offloaded, in each of two optimizers, until the fraction is reached.
        assert said.optimizer - 2 * 16 * largest <= gpu <= 1.01 * said.optimizer
        if rank == 0:
            expected = HOST_BYTES * held(workload, mapping) * storage.optimizer_offload_fraction
            assert 0.99 * expected <= host <= 1.01 * expected + 2 * HOST_BYTES * largest


def trained(
    folding: ParallelFolding,
    storage: OptimizerStorage,
    reload: bool = False,
    save_to: Path | None = None,
    load_from: Path | None = None,
) -> list[torch.Tensor]:
    """Train for three steps; return the parameters.

    Args:
        folding: The mapping.
        storage: How the optimizer is stored; Megatron's default runs without the made-up GPU.
        reload: Give the model its weights after the optimizer is made, as upcycling does.
        save_to: Where to save after the second step.
        load_from: Where to go on from after the second step, from other weights.
    """
    from contextlib import nullcontext

    from megatron.core import dist_checkpointing

    from tests.distributed.two_processors import gpu_and_host

    with nullcontext() if storage.is_default else gpu_and_host():
        run = Run(folding, storage)
        if reload or load_from is not None:
            weights = [parameter.detach().clone() for parameter in run.parameters()]
            with torch.no_grad():
                for parameter in run.parameters():
                    parameter.fill_(0.5)
            run.optimizer.reload_model_params()
        if reload:
            with torch.no_grad():
                for parameter, weight in zip(run.parameters(), weights, strict=True):
                    parameter.copy_(weight)
            run.optimizer.reload_model_params()
        if load_from is not None:
            state = dist_checkpointing.load(run.sharded(is_loading=True), load_from)
            for index, chunk in enumerate(run.chunks):
                chunk.load_state_dict(state[f"model{index}"])
            run.optimizer.load_state_dict(state["optimizer"])
        for number in range(2 if load_from is not None else 0, STEPS):
            if save_to is not None and number == 2:
                save_to.mkdir(exist_ok=True)
                torch.distributed.barrier()
                dist_checkpointing.save(run.sharded(is_loading=False), save_to)
            run.step(number)
        return [parameter.detach().float().clone() for parameter in run.parameters()]


@pytest.mark.thorough
def test_offloading_changes_no_bit_and_resumes(ranks: RankPool, tmp_path: Path) -> None:
    """Not with another fraction, not when weights come late, not after a resume."""
    folding = spread(2).folding

    def on_two(fraction: float, **options: Any) -> list[torch.Tensor]:
        kwargs = {"folding": folding, "storage": offloaded(fraction), **options}
        return [each for rank in ranks.run(trained, 2, **kwargs) for each in rank]

    whole = on_two(1.0, save_to=tmp_path / "saved")
    others = {
        "half": on_two(0.5),
        "weights come late": on_two(0.5, reload=True),
        "resumed": on_two(1.0, load_from=tmp_path / "saved"),
        "resumed with another fraction": on_two(0.5, load_from=tmp_path / "saved"),
    }
    for name, other in others.items():
        assert all(map(torch.equal, whole, other)), name
    # AdamW without offloading is another kernel, with other rounding.
    for mine, plain in zip(whole, on_two(0.0), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1.6e-2, atol=1e-5)
