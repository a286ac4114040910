"""NeMo-Run configurations from a recipe's numbers."""

import nemo_upcycle.nemo  # noqa: F401  checks versions, before NeMo is imported

# isort: split

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args

import nemo_run as run
import torch
from megatron.core.transformer import TransformerConfig
from nemo.collections import llm
from nemo.collections.llm.gpt.model.llama import Llama31Config, LlamaConfig
from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback
from nemo.utils.exp_manager import TimingCallback
from nemo_upcycle_recipes import components, executors, on_host
from nemo_upcycle_recipes.arguments import arguments, defaults
from nemo_upcycle_recipes.recipe import OF_OPTIMIZER, Recipe, Schedule

from nemo_upcycle.checkpoint.branches import split_sources
from nemo_upcycle.checkpoint.described import moe_here
from nemo_upcycle.config import PRECISIONS, RECOMPUTE, ParallelFolding, UpcyclingConfig
from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.data.checks import check_on_login
from nemo_upcycle.data.paths import parse
from nemo_upcycle.engine import cpu
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import Architecture
from nemo_upcycle.families.fields import moe_fields, window_fields
from nemo_upcycle.families.model import experts_of, upcycling_of
from nemo_upcycle.nemo.auto_resume import AutoResume
from nemo_upcycle.nemo.callback import UpcyclingCallback
from nemo_upcycle.nemo.cpu import cpu_layer_spec
from nemo_upcycle.nemo.export_callback import ExportCallback
from nemo_upcycle.nemo.fused_gradients import FusedWeightGradients
from nemo_upcycle.nemo.mfu import MFUCallback
from nemo_upcycle.nemo.model import (
    UpcycledGPTConfig,
    UpcycledGPTModel,
    architecture_fields,
    is_llama,
)
from nemo_upcycle.nemo.moe_health import MoEHealthCallback
from nemo_upcycle.nemo.offloaded_optimizer import OffloadedOptimizer
from nemo_upcycle.nemo.preemption import PreemptionCallback
from nemo_upcycle.nemo.provenance import Provenance
from nemo_upcycle.nemo.router_warm_up import RouterWarmUp
from nemo_upcycle.nemo.run_numbers import check_max_steps
from nemo_upcycle.nemo.tokenizer import checkpoint_tokenizer
from nemo_upcycle.nemo.versions import check_pretrain
from nemo_upcycle.plans import layout

check_pretrain(llm)

F = TypeVar("F", bound=Callable[..., run.Partial])


class UpcyclingWarning(UserWarning):
    """An option that is allowed, but makes step 0 inexact."""


def takes_numbers_of(
    recipe: Recipe, chosen: Collection[str] = (), **others: Any
) -> Callable[[F], F]:
    """Replace a factory's `**numbers` by named arguments, which decide a recipe's plan.

    Names, types and defaults are those of `UpcyclingConfig`, `ParallelFolding` and `Recipe`.
    NeMo-Run's command line reads them from the signature.

    Args:
        recipe: The recipe.
        chosen: Arguments that the factory chooses if not given: their default is None.
        others: Other defaults by name.
    """

    def decorate(factory: F) -> F:
        signature = inspect.signature(factory)
        *own, _ = signature.parameters.values()
        given = defaults(recipe) | others
        types = arguments(recipe)
        for name in chosen:
            given[name], types[name] = None, types[name] | None
        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, **_typed(name, kind, given))
            for name, kind in types.items()
        ]
        factory.__signature__ = signature.replace(parameters=[*own, *parameters])  # type: ignore[attr-defined]
        return factory

    return decorate


def _typed(name: str, kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter's default, and an annotation that NeMo-Run's command line can parse."""
    if name == "moe_layer_freq":
        return {"default": str(given[name]), "annotation": str}
    if isinstance(kind, UnionType):
        kind = Union[get_args(kind)]
    return {"default": given[name], "annotation": kind}


def model(
    arch: Architecture,
    upcycling: UpcyclingConfig,
    seq_length: int,
    tokenizer: run.Config | None,
    overrides: dict[str, Any],
    tensor_model_parallel_size: int,
) -> run.Config:
    """Configure the model: NeMo's Llama if a Llama stays dense, ours otherwise.

    NeMo's Llama requires a vocabulary that TP divides.
    """
    of_dense = architecture_fields(arch) | window_fields(arch, seq_length)
    fields = of_dense | {"seq_length": seq_length} | overrides
    if upcycling.num_moe_experts is None:
        fields = {name: value for name, value in fields.items() if not name.startswith("moe_")}
        if is_llama(arch) and arch.vocab_size % tensor_model_parallel_size == 0:
            dense_config = LlamaConfig if arch.rope_scaling is None else Llama31Config
            return run.Config(
                llm.LlamaModel, config=run.Config(dense_config, **fields), tokenizer=tokenizer
            )
    fields = moe_fields(arch, upcycling) | fields
    return run.Config(
        UpcycledGPTModel, config=run.Config(UpcycledGPTConfig, **fields), tokenizer=tokenizer
    )


def on_cpu(accelerator: str) -> bool:
    """Return whether `auto`, `cpu` or `gpu` means the CPU on this machine."""
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"accelerator is {accelerator!r}; expected 'auto', 'cpu' or 'gpu'.")
    return accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())


def pretrain(
    recipe: Recipe,
    *,
    dir: str | None,
    name: str,
    dense_checkpoint: str | None,
    tokenizer: str | None,
    data_paths: str | None,
    data_blend: str | None = None,
    max_steps: int | None = None,
    accelerator: str = "gpu",
    from_scratch: bool = False,
    read_once: bool = False,
    performance_mode: bool = False,
    cuda_graphs: bool = False,
    wandb_project: str | None = None,
    router_warmup_steps: int = 0,
    export_every_n: int | None = None,
    model_overrides: dict[str, Any] | None = None,
    callbacks: list[run.Config] | None = None,
    fn: Callable = llm.pretrain,
) -> run.Partial:
    """Configure a training run.

    Args:
        recipe: The recipe's numbers. GPUs and nodes are ignored on CPU, where the launcher decides.
        dir: Directory of runs; this run goes to `dir/name`.
        name: The run's name.
        dense_checkpoint: Weights to start from, or several checkpoints separated by semicolons;
            None trains from random weights.
        tokenizer: Directory of the tokenizer; None takes the dense checkpoint's.
        data_paths: Megatron `.bin/.idx` prefixes, separated by spaces, each with a weight before
            it if blended (Megatron's `--data-path`); quote a prefix with spaces. None trains on
            NeMo's mock data.
        data_blend: A blend's YAML, or the name of a blend of the package; instead of
            `data_paths`.
        max_steps: Training steps; None takes the recipe's.
        accelerator: `gpu`, `cpu`, or `auto`, which takes the GPU if there is one.
        from_scratch: Take the dense checkpoint's config and tokenizer, and random weights. The
            checkpoint may then also be a Hugging Face MoE with the recipe's experts.
        read_once: Read each slice of the dense checkpoint once per job and broadcast the slice.
        performance_mode: Overlap collectives with computation, run garbage collection manually.
        cuda_graphs: Record each layer's kernels once and replay them; needs static shapes. Without
            MoE health metrics and fused weight gradients, whose Python is not replayed.
        wandb_project: Project of Weights & Biases to log to, in addition to TensorBoard.
        router_warmup_steps: First steps in which only the routers are trained.
        export_every_n: Write a Hugging Face directory for every n-th checkpoint and the last.
        model_overrides: Fields of the model's config.
        callbacks: Further callbacks.
        fn: The function that the run calls.

    Returns:
        The configuration of `fn`.

    Raises:
        UpcyclingError: The mapping does not fit the ranks or the model. Or the experts are not as
            wide as a shard of the dense feed-forward layer. Or `data_paths` are malformed, or a
            dataset on this machine contradicts its manifest or has tokens that the model lacks.
    """
    if max_steps is not None:
        check_max_steps(max_steps)
    cpu_only = on_cpu(accelerator)
    upcycling, folding, schedule = recipe.upcycling, recipe.folding, recipe.schedule
    if data_blend is not None:
        if data_paths is not None:
            raise UpcyclingError("Both data_paths and data_blend are given; give one of them.")
        data_paths = read_blend(data_blend).data_paths
    paths = None if data_paths is None else parse(data_paths)
    sources = [] if dense_checkpoint is None else split_sources(dense_checkpoint)
    arch = _architecture(recipe, dense_checkpoint, from_scratch)
    check_on_login(paths or (), arch.vocab_size)
    # On CPU the launcher decides the number of ranks; the strategy checks the number.
    layout.validate(arch, upcycling, folding, None if cpu_only else recipe.world_size)
    if cpu_only:
        on_host.remember(recipe, arch, executors.ranks() or 1)
    overrides = dict(model_overrides or {})
    layout.validate_expert_width(arch, upcycling, overrides.get("moe_ffn_hidden_size"))
    upcycles = bool(sources) and not from_scratch
    if upcycles:
        _warn(upcycling, arch, len(sources))
    overrides |= RECOMPUTE[recipe.recompute]
    if cpu_only and recipe.recompute in ("moe_act", "norm_act"):
        raise UpcyclingError(
            f"recompute is {recipe.recompute!r}, which needs grouped GEMM and therefore a GPU; on "
            "CPU use 'none', 'moe' or 'full'."
        )
    overrides |= _fp8(recipe, cpu_only)
    if cuda_graphs:
        overrides |= _cuda_graphs(recipe, cpu_only)
    if cpu_only and not recipe.optimizer.is_default:
        raise UpcyclingError(
            f"The recipe says {recipe.optimizer}, to save GPU memory, which needs a GPU and "
            f"Transformer Engine. On CPU leave {', '.join(OF_OPTIMIZER)} out."
        )
    if cpu_only:
        overrides |= cpu.MODEL_OVERRIDES | {"transformer_layer_spec": cpu_layer_spec}
    elif upcycling.num_moe_experts is not None:
        overrides |= {"moe_grouped_gemm": True, "moe_permute_fusion": True}
    prefixes = [path.prefix for path in paths or ()]
    _check_inputs_outside(components.run_directory(dir, name), [tokenizer, *prefixes])
    source = tokenizer or (sources[0] if sources else None)
    model_of_tokenizer = {"model": sources[0]} if tokenizer and sources else {}
    tokenizer_config = (
        run.Config(checkpoint_tokenizer, source=source, **model_of_tokenizer) if source else None
    )
    watches_experts = upcycling.num_moe_experts is not None and not cuda_graphs
    all_callbacks = [*_observers(schedule, watches_experts), *(callbacks or [])]
    if not (cpu_only or cuda_graphs):
        all_callbacks.append(run.Config(FusedWeightGradients))
    if recipe.optimizer_offload_fraction:
        all_callbacks.append(run.Config(OffloadedOptimizer))
    all_callbacks += router_warm_up(upcycling, router_warmup_steps)
    if export_every_n is not None:
        all_callbacks.append(_export_callback(upcycling, export_every_n))
    if performance_mode:
        all_callbacks += _performance(folding, cpu_only)
    if upcycles:
        all_callbacks.append(_upcycling_callback(dense_checkpoint, upcycling, read_once))
    else:
        all_callbacks.append(run.Config(Provenance, model_of=sources[0] if sources else None))
    trainer = components.trainer(
        recipe,
        max_steps=schedule.max_steps if max_steps is None else max_steps,
        cpu_only=cpu_only,
        callbacks=all_callbacks,
    )
    if cuda_graphs:
        trainer.strategy.use_te_rng_tracker = True
    return run.Partial(
        fn,
        model=model(
            arch,
            upcycling,
            schedule.seq_length,
            tokenizer_config,
            overrides,
            folding.tensor_model_parallel_size,
        ),
        trainer=trainer,
        data=components.data(schedule, paths, tokenizer_config, cpu_only),
        log=components.log(dir, name, schedule, wandb_project),
        optim=components.optim(schedule, recipe.precision, recipe.optimizer),
        resume=run.Config(AutoResume, resume_if_exists=True, resume_ignore_no_checkpoint=True),
    )


def _architecture(recipe: Recipe, dense_checkpoint: str | None, from_scratch: bool) -> Architecture:
    """Return the model's architecture, without weights also that of an MoE with the same experts.

    Raises:
        UpcyclingError: The dense checkpoint is none, or the MoE has other experts than the recipe.
    """
    moe = moe_here(dense_checkpoint) if from_scratch and dense_checkpoint is not None else None
    if moe is None:
        return recipe.architecture_of(dense_checkpoint)
    width = moe.arch.ffn_hidden_size
    theirs = upcycling_of(moe, width)
    ours = upcycling_of(experts_of(recipe.upcycling, moe.arch.num_layers, width), width)
    other = [
        f"{field.name}={getattr(theirs, field.name)!r}"
        for field in fields(UpcyclingConfig)
        if getattr(theirs, field.name) != getattr(ours, field.name)
    ]
    if other:
        raise UpcyclingError(
            f"{dense_checkpoint} has other experts than the recipe; expected {', '.join(other)}."
        )
    return moe.arch


def _fp8(recipe: Recipe, cpu_only: bool) -> dict[str, Any]:
    """Return the model's fields for matrix products in FP8.

    Raises:
        UpcyclingError: The run is on CPU, or the dispatcher cannot pad for FP8.
    """
    fields = PRECISIONS[recipe.precision].fields
    if not fields:
        return {}
    if cpu_only:
        raise UpcyclingError(
            f"precision is {recipe.precision!r}, which needs a GPU and Transformer Engine; on CPU "
            "use '32' or 'bf16-mixed'."
        )
    if recipe.upcycling.num_moe_experts is None:
        return fields
    dispatcher = recipe.upcycling.moe_token_dispatcher_type
    if dispatcher == "allgather":
        raise UpcyclingError(
            f"precision is {recipe.precision!r}, moe_token_dispatcher_type {dispatcher!r}, which "
            "cannot pad the experts' tokens for FP8; use 'alltoall' or 'flex'."
        )
    # Products in FP8 need numbers of tokens that 16 or 32 divides.
    return {**fields, "moe_router_padding_for_fp8": True}


def _cuda_graphs(recipe: Recipe, cpu_only: bool) -> dict[str, Any]:
    """Return the model's fields for CUDA graphs of layers, made by Megatron-Core.

    Raises:
        UpcyclingError: The run is on CPU, shapes vary from step to step, something is recomputed,
            or the installed Megatron-Core has no such graphs.
    """
    upcycling = recipe.upcycling
    if cpu_only:
        raise UpcyclingError(
            "cuda_graphs is set on CPU, but needs a GPU; leave it out, or use accelerator=gpu."
        )
    if upcycling.num_moe_experts is not None and not upcycling.moe_pad_expert_input_to_capacity:
        raise UpcyclingError(
            "cuda_graphs is set, but the number of tokens per expert varies from step to step, and "
            "a graph has fixed shapes. Pad to a capacity: moe_expert_capacity_factor=4.0 and "
            "moe_pad_expert_input_to_capacity=True, which computes more, or drops tokens with a "
            "smaller factor. Or leave cuda_graphs out."
        )
    if recipe.recompute != "none":
        raise UpcyclingError(
            f"cuda_graphs is set with recompute={recipe.recompute!r}, which Megatron-Core does not "
            "support; use recompute='none', with a smaller microbatch if memory is short."
        )
    if "cuda_graph_impl" not in {field.name for field in fields(TransformerConfig)}:
        raise UpcyclingError(
            "cuda_graphs is set, but the installed Megatron-Core has no cuda_graph_impl; expected "
            "megatron-core 0.15. Leave cuda_graphs out."
        )
    return {"cuda_graph_impl": "local", "use_te_rng_tracker": True}


def _check_inputs_outside(run_directory: Path, inputs: Iterable[str | None]) -> None:
    """Refuse inputs in a run's directory, whose files NeMo moves away at a new start."""
    for path in filter(None, inputs):
        if run_directory.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            raise UpcyclingError(
                f"{path} lies in the run's own directory {run_directory}, which the run would "
                "change; expected one outside. Give the run another name or directory."
            )


def _observers(schedule: Schedule, watches_experts: bool) -> list[run.Config]:
    """Configure the callbacks that observe every run."""
    callbacks = [
        run.Config(TimingCallback),
        run.Config(MFUCallback),
        run.Config(PreemptionCallback),
    ]
    if watches_experts:
        interval = schedule.moe_health_interval
        callbacks.append(run.Config(MoEHealthCallback, every_n_steps=interval))
    return callbacks


def router_warm_up(upcycling: UpcyclingConfig, router_warmup_steps: int) -> list[run.Config]:
    """Return the callback that trains only the routers for the first steps, if there are any.

    Raises:
        UpcyclingError: The number is negative, or the model has no routers.
    """
    if router_warmup_steps == 0:
        return []
    if upcycling.num_moe_experts is None:
        raise UpcyclingError(
            f"router_warmup_steps is {router_warmup_steps} for a dense model, which has no "
            "routers. Leave it out."
        )
    if router_warmup_steps < 1:
        raise UpcyclingError(
            f"router_warmup_steps is {router_warmup_steps}; expected 1 or more, or 0 for none."
        )
    return [run.Config(RouterWarmUp, steps=router_warmup_steps)]


def _export_callback(upcycling: UpcyclingConfig, every_n: int) -> run.Config:
    if upcycling.num_moe_experts is None:
        raise UpcyclingError(
            "export_every_n is given for a dense model, which NeMo exports after the training: "
            "nemo llm export path=… target=hf output_path=…"
        )
    if every_n < 1:
        raise UpcyclingError(f"export_every_n is {every_n}; expected 1 or more.")
    return run.Config(ExportCallback, every_n=every_n)


def _performance(folding: ParallelFolding, cpu_only: bool) -> list[run.Config]:
    """Configure options that speed up a run, but not on every machine."""
    if cpu_only:
        raise UpcyclingError(
            "performance_mode is set on CPU, but needs GPUs; leave it out, or use accelerator=gpu."
        )
    return [
        # Ranks that collect garbage at different times wait for each other.
        run.Config(GarbageCollectionCallback, gc_interval_train=100, gc_interval_val=100),
        run.Config(
            MegatronCommOverlapCallback,
            tp_comm_overlap=folding.tensor_model_parallel_size > 1,
        ),
    ]


def _warn(upcycling: UpcyclingConfig, arch: Architecture, dense_checkpoints: int) -> None:
    """Warn before the start if the upcycled model will differ from the dense model at step 0."""
    exactness = upcycling.exactness(arch.gated_linear_unit, dense_checkpoints)
    if not exactness.exact:
        warnings.warn(f"step 0 is {exactness}", UpcyclingWarning, stacklevel=4)


def _upcycling_callback(
    dense_checkpoint: str | None, upcycling: UpcyclingConfig, read_once: bool
) -> run.Config:
    """Configure the upcycling callback; a dense model has nothing to initialize."""
    names = ("initializer", "weight_scaling", "router_initializer", "router_init_std")
    chosen: dict[str, Any] = {}
    if upcycling.num_moe_experts is not None:
        chosen = {name: getattr(upcycling, name) for name in names}
    return run.Config(
        UpcyclingCallback,
        dense_checkpoint=dense_checkpoint,
        **chosen,
        seed=upcycling.seed,
        read_once=read_once,
    )
