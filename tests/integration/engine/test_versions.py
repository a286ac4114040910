"""Megatron-Core 0.15 with the real numpy 2, and beside a compiler."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.distributed import transformers5

SHARD = """
import sys, numpy
assert numpy.__version__ >= "2", numpy.__version__
if sys.argv[1] == "mended":
    import nemo_upcycle.engine
import torch
from megatron.core.dist_checkpointing.exchange_utils import _shard_size
from megatron.core.dist_checkpointing.mapping import ShardedTensor
print("bytes:", _shard_size(ShardedTensor.from_rank_offsets("name", torch.zeros(2, 3))))
"""


@pytest.mark.thorough
@pytest.mark.skipif(version("megatron-core") >= "0.16", reason="needs Megatron-Core 0.15")
@pytest.mark.parametrize(
    ("as_it_is", "said"), [("mended", "bytes: 24"), ("as it is", "no attribute 'product'")]
)
def test_checkpoints_of_megatron_take_numpy_2(as_it_is: str, said: str) -> None:
    directory = transformers5.install()
    if directory is None:
        pytest.skip("numpy 2 cannot be installed")
    paths = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHARD, as_it_is],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
    )  # fmt: skip
    assert said in found.stdout + found.stderr


COMPILES = """
import sys
from torch.utils import cpp_extension
calls = []
def load_inline(**given):
    calls.append(given)
    raise OSError
cpp_extension.load_inline = load_inline
if sys.argv[1] == "mended":
    import nemo_upcycle.engine
import megatron.core.inference.unified_memory as unified_memory
assert not unified_memory.has_unified_memory
print("compilations:", len(calls))
"""


@pytest.mark.thorough
@pytest.mark.skipif(version("megatron-core") >= "0.16", reason="needs Megatron-Core 0.15")
@pytest.mark.parametrize(
    ("as_it_is", "said"), [("mended", "compilations: 0"), ("as it is", "compilations: 1")]
)
def test_megatron_compiles_nothing_at_import(as_it_is: str, said: str) -> None:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILES, as_it_is], capture_output=True, text=True
    )
    assert said in found.stdout
