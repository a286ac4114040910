"""Tests, whose models are tiny: threads of torch would cost more time than they save."""

import os

# Before torch is imported, here and in all processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
