"""From a dense checkpoint to scores, as one NeMo-Run experiment of four jobs.

    import → upcycle and train → export → evaluate

Each job waits for the one before it: on Slurm all are queued at once, with dependencies; elsewhere
they run one after another. Run it again after an interruption and it goes on: a training resumes,
an export that is there is kept.

    python examples/experiment.py expert_model_parallel_size=2 executor.ntasks_per_node=2

    python examples/experiment.py --recipe llama3_8b_e8t2 dir=/shared/runs \\
        dense_checkpoint=/models/Meta-Llama-3-8B data_blend=llama3_moe \\
        --executor slurm executor.container_image=image.sqsh executor.nodes=64 --detach \\
        --evaluation "--paper --tp 2 --ep 4"
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import fiddle
import nemo_run as run
from nemo.collections import llm

from nemo_upcycle.checkpoint.huggingface import resolve_directory
from nemo_upcycle.nemo.callback import UpcyclingCallback
from nemo_upcycle.nemo.model import UpcycledGPTModel

EVALUATION = "--tasks next_line --include-path demo/task --limit 200"
EXECUTOR = "executor."


def add_jobs(
    experiment: run.Experiment, train: run.Partial, executor: run.Executor, evaluation: str
) -> Path:
    """Add the four jobs to an experiment.

    Args:
        experiment: The experiment.
        train: A recipe with a dense checkpoint.
        executor: Executor of the training; the other jobs use one task on one node.
        evaluation: Options of `nemo-upcycle evaluate`.

    Returns:
        Path of the table of scores that the last job writes.
    """
    callback = next(c for c in train.trainer.callbacks if c.__fn_or_cls__ is UpcyclingCallback)
    dense = resolve_directory(callback.dense_checkpoint).resolve()
    train.log.log_dir = str(Path(train.log.log_dir).resolve())
    home = Path(train.log.log_dir, train.log.name)
    steps = train.trainer.max_steps
    imported, exported = Path(f"{home}_dense_nemo"), Path(f"{home}_{steps}_steps_hf")
    scores = Path(f"{home}_{steps}_steps_scores")
    callback.dense_checkpoint = str(imported)
    one_task = alone(executor)

    first = experiment.add(
        run.Partial(
            llm.import_ckpt,
            model=run.Config(UpcycledGPTModel),
            source=f"hf://{dense}",
            output_path=str(imported),
            overwrite=True,
        ),
        executor=one_task,
        name="import",
    )
    second = experiment.add(train, executor=executor, name="train", dependencies=[first])
    # Only a finished training has this checkpoint.
    last = f"{quoted(home)}/checkpoints/*-step={steps - 1}-*-last"
    there = f"test -e {quoted(exported)}/config.json"
    third = experiment.add(
        script(f"{there} || nemo-upcycle export {last} {quoted(exported)}"),
        executor=one_task,
        name="export",
        dependencies=[second],
    )
    experiment.add(
        script(
            f"nemo-upcycle evaluate {quoted(exported)} --dense {quoted(dense)} "
            f"--out {quoted(scores)} {evaluation}"
        ),
        executor=one_task,
        name="evaluate",
        dependencies=[third],
    )
    return scores / "scores.md"


def alone(executor: run.Executor) -> run.Executor:
    """Return the executor for a job with one task and no retries."""
    one = executor.clone()
    one.ntasks_per_node, one.launcher, one.retries = 1, None, 0
    if isinstance(one, run.SlurmExecutor):
        one.nodes = 1
    return one


def quoted(path: Path) -> str:
    """Return a path quoted for Bash."""
    return shlex.quote(str(path))


def script(line: str) -> run.Script:
    """Return a job that runs one line of Bash."""
    return run.Script(inline=f"set -euo pipefail\n{line}\n")


def made(kind: Any, name: str, settings: list[str]) -> Any:
    """Call a registered factory, like `nemo llm pretrain --factory "NAME(KEY=VALUE)"`."""
    factory = run.cli.resolve_factory(kind, name)
    return fiddle.build(run.cli.parse_cli_args(factory, settings))()


def main() -> None:
    """Parse the command line, run the experiment and print the scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", default="llama_tiny_e8t2", help="what `nemo llm pretrain --factory` takes")
    add("--executor", default="cpu", help="cpu, slurm, slurm_bare, or one of your own")
    add("--evaluation", default=EVALUATION, help="options of `nemo-upcycle evaluate`")
    add("--detach", action="store_true", help="on Slurm: queue the jobs and end")
    add("--dryrun", action="store_true", help="write the jobs' scripts, run none")
    add("settings", nargs="*", metavar="KEY=VALUE", help="the recipe's; executor.KEY=VALUE: its")
    arguments = parser.parse_intermixed_args()
    of_executor = [word for word in arguments.settings if word.startswith(EXECUTOR)]
    of_recipe = [word for word in arguments.settings if word not in of_executor]
    train = made(llm.pretrain, arguments.recipe, of_recipe)
    executor = made(
        run.LocalExecutor | run.SlurmExecutor,
        arguments.executor,
        [word.removeprefix(EXECUTOR) for word in of_executor],
    )
    with run.Experiment("upcycle") as experiment:
        scores = add_jobs(experiment, train, fiddle.build(executor), arguments.evaluation)
        if arguments.dryrun:
            experiment.dryrun(delete_exp_dir=False)
        else:
            experiment.run(detach=arguments.detach, tail_logs=True)
    if arguments.dryrun:
        print(f"The jobs' scripts are in {experiment._exp_dir}")
    elif arguments.detach:
        print(f"The scores will be in {scores}")
    elif scores.is_file():
        print(scores.read_text())
    else:
        sys.exit(f"{scores} was not written: a job failed; what it said is above.")


if __name__ == "__main__":
    main()
