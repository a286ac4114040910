"""The parts of a training run, as NeMo-Run configurations: trainer, data, optimizer, logs."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nemo_run as run
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from nemo_upcycle_recipes.recipe import Recipe, Schedule

from nemo_upcycle.config import PRECISIONS, OptimizerStorage
from nemo_upcycle.data.paths import DataPath, words_of
from nemo_upcycle.nemo import cpu
from nemo_upcycle.nemo.data_module import MockDataModule, PreTrainingDataModule
from nemo_upcycle.nemo.gpt_dataset import GPTDataset
from nemo_upcycle.nemo.model_checkpoint import ModelCheckpoint
from nemo_upcycle.nemo.run_name import check_name, checkpoint_prefix
from nemo_upcycle.nemo.strategy import MegatronStrategy


def trainer(
    recipe: Recipe, *, max_steps: int, cpu_only: bool, callbacks: list[run.Config]
) -> run.Config:
    """Configure the trainer and its Megatron strategy."""
    folding, precision = recipe.folding, PRECISIONS[recipe.precision]
    strategy = run.Config(
        cpu.CpuMegatronStrategy if cpu_only else MegatronStrategy,
        **folding.strategy_arguments,
        pipeline_dtype=torch.bfloat16 if precision.is_bf16 else torch.float32,
        gradient_as_bucket_view=True,
        ckpt_async_save=not cpu_only,
        ckpt_parallel_load=True,
        # This lets a run continue under another mapping.
        ckpt_optim_fully_reshardable=True,
        # Otherwise saving gathers whole buffers on the GPUs, which have little memory left if the
        # optimizer's state had to be made smaller.
        distrib_optim_fully_reshardable_mem_efficient=not recipe.optimizer.is_default,
        ddp=run.Config(
            DistributedDataParallelConfig,
            use_distributed_optimizer=True,
            check_for_nan_in_grad=True,
            grad_reduce_in_fp32=recipe.grad_reduce_in_fp32,
            overlap_grad_reduce=not cpu_only,
            overlap_param_gather=not cpu_only,
        ),
    )
    return run.Config(
        nl.Trainer,
        accelerator=run.Config(cpu.GlooAccelerator) if cpu_only else "gpu",
        devices="auto" if cpu_only else recipe.num_gpus_per_node,
        num_nodes=recipe.num_nodes,
        max_steps=max_steps,
        val_check_interval=min(recipe.schedule.val_check_interval, max_steps),
        limit_val_batches=4,
        limit_test_batches=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        plugins=run.Config(
            nl.MegatronMixedPrecision,
            precision="bf16-mixed" if precision.is_bf16 else "32",
            **precision.fields,
            grad_reduce_in_fp32=recipe.grad_reduce_in_fp32,
        ),
        strategy=strategy,
        callbacks=callbacks,
    )


def data(
    schedule: Schedule,
    paths: Sequence[DataPath] | None,
    tokenizer: run.Config | None,
    cpu_only: bool,
) -> run.Config:
    """Configure the data: a Megatron blend, or NeMo's mock data for measuring speed."""
    sizes = {
        "seq_length": schedule.seq_length,
        "global_batch_size": schedule.global_batch_size,
        "micro_batch_size": schedule.micro_batch_size,
        "tokenizer": tokenizer,
        "num_workers": 0 if cpu_only else 8,
    }
    if paths is None:
        return run.Config(MockDataModule, **sizes)
    return run.Config(
        PreTrainingDataModule,
        paths=words_of(paths),
        split="970,20,10",
        dataset_cls=GPTDataset,
        **sizes,
    )


def optim(schedule: Schedule, precision: str, storage: OptimizerStorage) -> run.Config:
    """Configure Adam, ZeRO-1, and a cosine schedule after a linear warm-up."""
    return run.Config(
        MegatronOptimizerModule,
        config=run.Config(
            OptimizerConfig,
            optimizer="adam",
            lr=schedule.lr,
            min_lr=schedule.min_lr,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=1e-8,
            clip_grad=1.0,
            bf16=PRECISIONS[precision].is_bf16,
            use_distributed_optimizer=True,
            **stored(storage),
        ),
        lr_scheduler=run.Config(
            CosineAnnealingScheduler,
            warmup_steps=schedule.warmup_steps,
            constant_steps=0,
            min_lr=schedule.min_lr,
        ),
    )


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}


def stored(storage: OptimizerStorage) -> dict[str, Any]:
    """Return Megatron's fields for a way to store the optimizer."""
    if storage.is_default:
        return {}
    moments = _DTYPES[storage.optimizer_state]
    fields: dict[str, Any] = {
        "use_precision_aware_optimizer": True,
        # Checkpoints that continue under another mapping store fp32 parameters, from which Megatron
        # cannot load remainders.
        "store_param_remainders": False,
        "exp_avg_dtype": moments,
        "exp_avg_sq_dtype": moments,
        "main_grads_dtype": torch.float32 if storage.grad_reduce_in_fp32 else torch.bfloat16,
    }
    if storage.optimizer_offload_fraction:
        # Not overlap_cpu_optimizer_d2h_h2d: in Megatron-Core 0.15.3 the next forward pass would not
        # wait for the parameters.
        fields |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": storage.optimizer_offload_fraction,
        }
    return fields


def run_directory(dir: str | None, name: str) -> Path:
    """Return NeMo's directory for a run.

    Raises:
        UpcyclingError: The name is not valid for a directory under `dir`.
    """
    check_name(name)
    return Path(dir or "nemo_experiments") / name


def log(
    dir: str | None, name: str, schedule: Schedule, wandb_project: str | None = None
) -> run.Config:
    """Configure logs and checkpoints under `dir/name`."""
    wandb = None
    if wandb_project is not None:
        # With a fixed id a resumed run continues on the same page.
        page = re.sub(r"[/\\#?%:]", "-", name)
        wandb = run.Config(WandbLogger, project=wandb_project, name=name, id=page, resume="allow")
    return run.Config(
        nl.NeMoLogger,
        log_dir=dir,
        name=name,
        # The directory must be the same at every start, or the run would not resume.
        use_datetime_version=False,
        tensorboard=run.Config(TensorBoardLogger, save_dir="tb_logs", name=name),
        wandb=wandb,
        ckpt=run.Config(
            ModelCheckpoint,
            every_n_train_steps=schedule.checkpoint_interval,
            # NeMo resumes only from "-last". With save_top_k every checkpoint would be written
            # twice, and a run killed between the two writes would start anew.
            save_last=True,
            save_top_k=0,
            monitor="reduced_train_loss",
            filename=f"{checkpoint_prefix(name)}--{{reduced_train_loss:.2f}}-{{step}}-{{consumed_samples}}",
            # Otherwise the last checkpoint has no optimizer state and cannot be resumed.
            save_optim_on_train_end=True,
        ),
    )
