"""A recipe of Megatron-Bridge that trains an MoE of a dense checkpoint.

Written for the Megatron-Bridge of August 2026 (0.7), whose configs have hooks; needs GPUs.
`torchrun --nproc-per-node 8 megatron_bridge.py DIR RUN` begins, and resumes.
"""

import sys

from megatron.bridge.models.gpt.model_config import BridgeGPTModelConfig
from megatron.bridge.recipes.llama import llama32_1b_pretrain_1gpu_h100_bf16_config as recipe
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

from nemo_upcycle import ParallelFolding, UpcyclingConfig
from nemo_upcycle.megatron import TrainingMetrics, gpt_model_config, upcycle


def main(dense: str, run: str) -> None:
    cfg = recipe()
    cfg.checkpoint.save = cfg.checkpoint.load = run
    upcycling, folding = UpcyclingConfig(num_moe_experts=8), ParallelFolding.of(ep=8)
    length = cfg.dataset.seq_length
    cfg.model = gpt_model_config(
        dense, upcycling, folding, seq_length=length, config_class=BridgeGPTModelConfig
    )
    cfg.model.pre_wrap_hooks.append(upcycle(dense, upcycling, resume_from=cfg.checkpoint.load))
    pretrain(cfg, forward_step, callbacks=[TrainingMetrics(upcycling)])


if __name__ == "__main__":
    main(*sys.argv[1:])
