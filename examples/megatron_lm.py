"""Megatron-LM's pretrain_gpt.py that begins from a dense checkpoint.

It takes the arguments of pretrain_gpt.py, and --upcycle-from DIR. The model's arguments have to be
the dense model's; where one is not, the run stops before its first step and names it. With one
directory as --save and --load, the same command resumes. Written for Megatron-LM core_v0.19.0:

    PYTHONPATH=Megatron-LM torchrun --nproc-per-node 8 megatron_lm.py --upcycle-from DIR \\
        --num-experts 8 --moe-router-topk 2 --moe-router-dtype fp32 --save RUN --load RUN …
"""

import pretrain_gpt
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from nemo_upcycle.megatron import upcycle


def add_arguments(parser):
    parser.add_argument("--upcycle-from", required=True, help="dense checkpoint to begin from")
    return parser


if __name__ == "__main__":
    args = parse_and_validate_args(
        add_arguments, args_defaults={"tokenizer_type": "GPT2BPETokenizer"}
    )
    model = gpt_config_from_args(args)
    model.rope_scaling_factor = args.rope_scaling_factor  # which 0.19 forgets
    padding = args.make_vocab_size_divisible_by
    hook = upcycle(args.upcycle_from, resume_from=args.load, vocab_size_divisible_by=padding)
    model.pre_wrap_hooks.append(hook)
    datasets = pretrain_gpt.train_valid_test_datasets_provider
    datasets.is_distributed = True
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        datasets,
        ModelType.encoder_or_decoder,
        pretrain_gpt.forward_step,
        get_embedding_ranks=pretrain_gpt.get_embedding_ranks,
    )
