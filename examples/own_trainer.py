"""Upcycle in a NeMo script with a custom trainer, without a recipe and without NeMo-Run.

    python examples/own_trainer.py DENSE DATA RUNS                       # one process
    torchrun --nproc-per-node 2 examples/own_trainer.py DENSE DATA RUNS  # experts on two ranks

DENSE is a Hugging Face directory with a tokenizer. DATA is the prefix of Megatron's .bin and .idx
files, as written by `nemo-upcycle data tokenize`. RUNS is the directory for checkpoints. The script
runs on CPU over gloo if there is no GPU.
"""

import os
import sys

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm

from nemo_upcycle import ParallelFolding, UpcyclingConfig, open_dense
from nemo_upcycle.engine.cpu import MODEL_OVERRIDES
from nemo_upcycle.families.fields import moe_fields
from nemo_upcycle.nemo import cpu
from nemo_upcycle.nemo.callback import UpcyclingCallback
from nemo_upcycle.nemo.data_module import PreTrainingDataModule
from nemo_upcycle.nemo.model import UpcycledGPTConfig, UpcycledGPTModel, architecture_fields
from nemo_upcycle.nemo.model_checkpoint import ModelCheckpoint
from nemo_upcycle.nemo.strategy import MegatronStrategy
from nemo_upcycle.nemo.tokenizer import checkpoint_tokenizer

STEPS, SEQ_LENGTH = 10, 128
ON_GPU = torch.cuda.is_available()


def model_of(dense: str, upcycling: UpcyclingConfig) -> UpcycledGPTModel:
    """Return the MoE of a dense checkpoint, with random weights until the callback fills them."""
    arch = open_dense(dense).arch
    fields = architecture_fields(arch) | moe_fields(arch, upcycling) | {"seq_length": SEQ_LENGTH}
    if not ON_GPU:
        fields |= MODEL_OVERRIDES | {"transformer_layer_spec": cpu.cpu_layer_spec}
    return UpcycledGPTModel(UpcycledGPTConfig(**fields), tokenizer=checkpoint_tokenizer(dense))


def trainer_of(dense: str, folding: ParallelFolding) -> nl.Trainer:
    """Return a trainer whose callback upcycles the dense checkpoint before the first step."""
    strategy = MegatronStrategy if ON_GPU else cpu.CpuMegatronStrategy
    return nl.Trainer(
        accelerator="gpu" if ON_GPU else cpu.GlooAccelerator(),
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        max_steps=STEPS,
        limit_val_batches=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        plugins=nl.MegatronMixedPrecision("bf16-mixed" if ON_GPU else "32"),
        strategy=strategy(
            **folding.strategy_arguments,
            ckpt_async_save=False,
            ckpt_optim_fully_reshardable=True,  # a run can be resumed under another mapping
        ),
        callbacks=[UpcyclingCallback(dense_checkpoint=dense)],
    )


def main(dense: str, data: str, runs: str) -> None:
    """Upcycle and train ten steps."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    llm.train(
        model=model_of(dense, UpcyclingConfig(num_moe_experts=4, moe_router_topk=2)),
        trainer=trainer_of(dense, ParallelFolding(expert_model_parallel_size=ranks)),
        data=PreTrainingDataModule(
            paths=[data],
            seq_length=SEQ_LENGTH,
            global_batch_size=4,
            micro_batch_size=1,
            num_workers=0,
            tokenizer=checkpoint_tokenizer(dense),
        ),
        optim=nl.MegatronOptimizerModule(OptimizerConfig(lr=1e-4, use_distributed_optimizer=True)),
        log=nl.NeMoLogger(
            log_dir=runs,
            name="own",
            use_datetime_version=False,
            # Save the model's config beside the weights, unlike NeMo's default.
            ckpt=ModelCheckpoint(save_last=True, save_top_k=0, always_save_context=True),
        ),
    )


if __name__ == "__main__":  # NeMo starts processes for saving
    main(*sys.argv[1:])
