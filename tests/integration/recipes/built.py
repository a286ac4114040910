"""What a recipe says before it is built."""

from typing import Any

from nemo_upcycle.config import ParallelFolding


def callbacks(built: Any) -> list[str]:
    """Return the names of a recipe's callbacks, in order."""
    return [callback.__fn_or_cls__.__name__ for callback in built.trainer.callbacks]


def megatrons_config(built: Any) -> Any:
    """Make Megatron's config, which checks itself, without the kernels that this machine lacks."""
    import fiddle

    from nemo_upcycle.engine import cpu

    config, strategy = built.model.config, built.trainer.strategy
    lacking = {name for name in cpu.MODEL_OVERRIDES if name != "moe_grouped_gemm"}
    values = {name: cpu.MODEL_OVERRIDES[name] for name in lacking}
    values |= {name: getattr(strategy, name) for name in ParallelFolding().strategy_arguments}
    values |= {"pipeline_dtype": strategy.pipeline_dtype, "bf16": True}
    for name, value in values.items():
        setattr(config, name, value)
    return fiddle.build(config)
