"""Run a command of ours on several ranks of this machine, as torchrun would."""

import logging
import os
import sys
import tempfile
from math import lcm
from pathlib import Path

from nemo_upcycle.config import ParallelFolding

SECONDS_TO_END = 5
"""After Ctrl-C; a rank that waits for another in a collective hears of nothing else."""


def fewest_ranks(folding: ParallelFolding) -> int:
    """Return the ranks that a mapping needs at least."""
    attention = folding.tensor_model_parallel_size * folding.context_parallel_size
    experts = folding.expert_tensor_parallel_size * folding.expert_model_parallel_size
    return folding.pipeline_model_parallel_size * lcm(attention, experts)


def launched() -> bool:
    """Return whether a launcher has started this process as one of several ranks."""
    return "RANK" in os.environ


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def launch(arguments: list[str], ranks: int, errors: str) -> int:
    """Run `nemo-upcycle ARGUMENTS` on ranks of this machine; rank 0 shows what it says.

    Args:
        arguments: The command and its arguments.
        ranks: How many.
        errors: The variable that tells ranks in which directory to leave what went wrong.

    Returns:
        An exit code. What went wrong is said once, in one line where all ranks say the same; of a
        rank that has left nothing, unless it is rank 0, the end of what it has printed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # They say at length that a rank has failed, which says why itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as said:
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
        os.environ[errors] = said
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_END))
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            left = (Path(said) / str(rank)).exists()
            _report_errors(Path(said))
            if not left and rank != 0:
                _show_log(Path(directory), rank)
            return max(1, failure.exitcode)
        except SignalException as error:
            print("Error: interrupted.", file=sys.stderr)
            return 128 + error.sigval
    return 0


def _report_errors(directory: Path) -> None:
    """Print the errors that ranks have left, each once."""
    by_message: dict[str, list[str]] = {}
    for file in sorted(directory.iterdir(), key=lambda file: int(file.name)):
        by_message.setdefault(file.read_text(), []).append(file.name)
    for message, ranks in by_message.items():
        who = f"rank {','.join(ranks)}: " if len(by_message) > 1 else ""
        print(f"Error: {who}{message}", file=sys.stderr)


def _show_log(directory: Path, rank: int) -> None:
    for log in directory.glob(f"**/{rank}/stderr.log"):
        print(f"rank {rank}:", log.read_text(errors="replace")[-2000:], file=sys.stderr)
