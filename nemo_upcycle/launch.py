"""Run a command of ours on several ranks of this machine, as torchrun would."""

import os
import sys
import tempfile
from math import lcm
from pathlib import Path

from nemo_upcycle.config import ParallelFolding


def fewest_ranks(folding: ParallelFolding) -> int:
    """Return the ranks that a mapping needs at least."""
    attention = folding.tensor_model_parallel_size * folding.context_parallel_size
    experts = folding.expert_tensor_parallel_size * folding.expert_model_parallel_size
    return folding.pipeline_model_parallel_size * lcm(attention, experts)


def launched() -> bool:
    """Say whether a launcher has started this process as one of several ranks."""
    return "RANK" in os.environ


def launch(arguments: list[str], ranks: int) -> int:
    """Run `nemo-upcycle ARGUMENTS` on ranks of this machine; rank 0 shows what it says.

    Args:
        arguments: The command and its arguments.
        ranks: How many.

    Returns:
        An exit code; what the first rank that failed has said is printed, unless it is rank 0.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory() as directory:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            run_id="nemo-upcycle",
            max_restarts=0,
            monitor_interval=0.1,
            local_addr="127.0.0.1",
            logs_specs=DefaultLogsSpecs(
                log_dir=directory, redirects=dict.fromkeys(range(1, ranks), Std.ALL)
            ),
        )
        command = (sys.executable, "-m", "nemo_upcycle.cli", *arguments)
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if rank != 0:
                _show(Path(directory), rank)
            return max(1, failure.exitcode)
    return 0


def _show(directory: Path, rank: int) -> None:
    for log in directory.glob(f"**/{rank}/stderr.log"):
        print(f"rank {rank}:", log.read_text(errors="replace")[-2000:], file=sys.stderr)
