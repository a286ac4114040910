"""NeMo-Run executors: where a recipe runs."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any, Optional

import nemo_run as run
from nemo_run.config import get_nemorun_home

SECONDS_TO_SAVE = 300
"""How long before its time limit a job is told to save and end."""

_PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_TO_SAVE)}
"""torchrun kills ranks that have not ended in time after it told them to: after 30 s by itself."""


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
    _find_torchrun()
    return run.Config(
        run.LocalExecutor,
        ntasks_per_node=ntasks_per_node,
        launcher="torchrun",
        env_vars=dict(_PATIENCE),
    )


@run.cli.factory
def slurm(
    container_image: Optional[str] = None,
    container_mounts: str = "",
    account: Optional[str] = None,
    partition: Optional[str] = None,
    nodes: int = 1,
    ntasks_per_node: int = 8,
    gpus_per_node: Optional[int] = 8,
    time: str = "04:00:00",
    retries: int = 20,
) -> run.Config[run.SlurmExecutor]:
    """Run on Slurm in a container (Pyxis), one rank a GPU; what is stopped is started again.

    Args:
        container_image: Image, as `srun --container-image` takes it. None: `nemo-upcycle.sqsh` in
            this directory, as `enroot import dockerd://nemo-upcycle` makes it of what `Dockerfile`
            builds.
        container_mounts: HOST:CONTAINER, several separated by spaces.
        account: Slurm's account.
        partition: Slurm's partition.
        nodes: Nodes.
        ntasks_per_node: Ranks a node.
        gpus_per_node: GPUs a node.
        time: Limit of each start; 5 minutes before it the run saves and goes back to the queue.
        retries: How often it goes back.

    Returns:
        The executor.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama3_8b_e8t2 \
                run.executor=slurm run.executor.nodes=64 \
                run.executor.container_image=/images/moe.sqsh \
                run.executor.container_mounts="['/shared:/shared']"
    """
    return _slurm(
        account=account,
        partition=partition,
        nodes=nodes,
        ntasks_per_node=ntasks_per_node,
        gpus_per_node=gpus_per_node,
        time=time,
        retries=retries,
        container_image=container_image or f"{Path.cwd()}/nemo-upcycle.sqsh",
        container_mounts=container_mounts.split(),
    )


@run.cli.factory
def slurm_bare(
    account: Optional[str] = None,
    partition: Optional[str] = None,
    nodes: int = 1,
    ntasks_per_node: int = 1,
    gpus_per_node: Optional[int] = None,
    time: str = "04:00:00",
    retries: int = 20,
) -> run.Config[run.SlurmExecutor]:
    """Run on Slurm in this environment, without a container; what is stopped is started again.

    Args:
        account: Slurm's account.
        partition: Slurm's partition.
        nodes: Nodes.
        ntasks_per_node: Ranks a node.
        gpus_per_node: GPUs a node; None on CPU.
        time: Limit of each start; 5 minutes before it the run saves and goes back to the queue.
        retries: How often it goes back.

    Returns:
        The executor.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory "llama_tiny_e8t2(dir='/shared/demo')" \
                run.executor=slurm_bare run.executor.ntasks_per_node=2
    """
    _find_torchrun()
    return _slurm(
        account=account,
        partition=partition,
        nodes=nodes,
        ntasks_per_node=ntasks_per_node,
        gpus_per_node=gpus_per_node,
        time=time,
        retries=retries,
    )


def _slurm(**options: Any) -> run.Config[run.SlurmExecutor]:
    # NeMo-Run looks for its jobs there, and nowhere else, when the tunnel is local.
    experiments = f"{get_nemorun_home()}/experiments"
    return run.Config(
        run.SlurmExecutor,
        # Otherwise it is made of the account, which not every cluster has.
        job_name_prefix="nemo-upcycle.",
        launcher="torchrun",
        packager=run.Config(run.Packager),
        tunnel=run.Config(run.LocalTunnel, job_dir=experiments),
        # The run saves and ends with 143; NeMo-Run's script then puts it back into the queue.
        signal=f"TERM@{SECONDS_TO_SAVE}",
        env_vars=dict(_PATIENCE),
        # A job that waits for one that has failed is taken out of the queue.
        additional_parameters={"requeue": True, "kill_on_invalid_dep": "yes"},
        **options,
    )


def _find_torchrun() -> None:
    """NeMo-Run starts it by name, also where the virtual environment is not activated."""
    if shutil.which("torchrun") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
