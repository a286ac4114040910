"""What the tests' processes have in common, imported: a server imports it once and forks them.

That is NeMo and the recipes, or Megatron-Core alone where NeMo is not installed. The import takes
10 s of processor time and makes a million objects. Garbage collection passes over them: a rank
would spend a quarter of its time on looking at them again and again.
"""

import gc
import os
from functools import partial

import torch

from tests.distributed.pool import HAS_NEMO

if HAS_NEMO:
    import nemo_upcycle_recipes.llama_tiny  # noqa: F401
else:
    import megatron.core  # noqa: F401

torch.set_num_threads(1)  # threads of OpenMP would not survive a fork
# A fork replaces torch's pool of threads at the first use. Two threads that are first at once may
# find none: "Invalid thread pool!" So the first use is here, while there is one thread.
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
gc.collect()
gc.freeze()
