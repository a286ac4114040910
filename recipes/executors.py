"""NeMo-Run executors: where a recipe runs."""

import os
import shutil
import sys
from pathlib import Path

import nemo_run as run


@run.cli.factory
def cpu(ntasks_per_node: int = 1) -> run.Config[run.LocalExecutor]:
    """Run on this machine's CPU, one gloo rank a task.

    Args:
        ntasks_per_node: Ranks to start.

    Returns:
        The executor.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama_tiny_e8t2 \
                run.executor=cpu run.executor.ntasks_per_node=2

        Python API usage:
            >>> run.run(recipe, executor=cpu(ntasks_per_node=2))
    """
    if shutil.which("torchrun") is None:
        # NeMo-Run starts it by name, also where the virtual environment is not activated.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return run.Config(run.LocalExecutor, ntasks_per_node=ntasks_per_node, launcher="torchrun")
