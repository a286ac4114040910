"""The tiny recipe, as one rank runs it."""

from pathlib import Path
from typing import Any

import torch

from tests.distributed.pool import nemo_recipe

EP2 = {"expert_model_parallel_size": 2}
FOLDED = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
}


WITHOUT_LEARNING = {
    "optim.config.lr": 0.0,
    "optim.config.min_lr": 0.0,
    "optim.lr_scheduler.min_lr": 0.0,
    "trainer.limit_val_batches": 0,
    "log.ckpt": None,
}


@nemo_recipe
def train(
    directory: Path,
    options: dict[str, Any],
    overrides: dict[str, Any] | None = None,
    dense_by_rank: list[str] | None = None,
    accident: tuple[str, dict[str, Any]] | None = None,
    factory: str = "upcycled_recipe",
) -> Any:
    """Run a tiny recipe; return this rank's losses and shards, or the error's text.

    An accident is the name of a callback of `accidents`, and its arguments.
    """
    import fiddle
    from nemo.lightning import RestoreConfig
    from nemo_upcycle_recipes import any_model, llama_tiny

    from tests.distributed import accidents
    from tests.distributed.recorder import Recorder

    module = any_model if factory == "upcycle" else llama_tiny
    recipe = getattr(module, factory)(dir=str(directory), **options)
    for path, value in (overrides or {}).items():
        owner, _, attribute = path.rpartition(".")
        target = recipe
        for name in filter(None, owner.split(".")):
            target = target[int(name)] if name.lstrip("-").isdigit() else getattr(target, name)
        if attribute == "restore_config":
            value = fiddle.Config(RestoreConfig, path=value)
        setattr(target, attribute, value)
    if dense_by_rank is not None:
        import os

        recipe.trainer.callbacks[-1].dense_checkpoint = dense_by_rank[int(os.environ["RANK"])]
    recorder = Recorder()
    try:
        run = fiddle.build(recipe)
        run.keywords["trainer"].callbacks.append(recorder)
        if accident is not None:
            name, arguments = accident
            run.keywords["trainer"].callbacks.append(getattr(accidents, name)(**arguments))
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert torch.distributed.is_initialized()
    return recorder.losses, recorder.shards
