"""NeMo and the recipes, or Megatron's training library, imported: the server does so once.

It forks the processes of tests.

The import takes 10 s of processor time and makes a million objects. Garbage collection passes over
them: a rank would spend a quarter of its time on looking at them again and again.
"""

import gc

import torch

from tests.stacks import HAS_NEMO

if HAS_NEMO:
    from nemo_upcycle_recipes import llama_tiny as heaviest
else:
    from tests.megatron import scenarios as heaviest

assert heaviest
torch.set_num_threads(1)  # threads of OpenMP would not survive a fork
gc.collect()
gc.freeze()
