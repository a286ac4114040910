"""NeMo and the recipes, imported: the server imports this module once and forks processes of tests.

The import takes 10 s of processor time and makes a million objects. Garbage collection passes over
them: a rank would spend a quarter of its time on looking at them again and again.
"""

import gc

import torch
from nemo_upcycle_recipes import llama_tiny

assert llama_tiny
torch.set_num_threads(1)  # threads of OpenMP would not survive a fork
gc.collect()
gc.freeze()
