"""What each recipe says, as plain data: dense model, upcycling, folding, schedule.

The NeMo-Run factories, the plan and the command line read it from here, so that no number is
written twice and only the factories import NeMo.
"""

import ast
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from nemo_upcycle.branches import split_sources
from nemo_upcycle.checkpoint import is_checkpoint, open_checkpoint
from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.mapping import Architecture, family_of

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a recipe trains. Lengths in tokens, batch sizes in sequences."""

    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    max_steps: int
    lr: float
    min_lr: float
    warmup_steps: int
    val_check_interval: int
    checkpoint_interval: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.seq_length * self.global_batch_size


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        name: What `--factory` takes.
        dense: Name of the dense model's Hugging Face config in `configs/`.
        upcycling: What its feed-forward layers become.
        folding: How the model is spread.
        schedule: How it trains.
        num_nodes: Nodes.
        num_gpus_per_node: GPUs a node.
        precision: `bf16-mixed` or `32`.
    """

    name: str
    dense: str
    upcycling: UpcyclingConfig
    folding: ParallelFolding
    schedule: Schedule
    num_nodes: int = 1
    num_gpus_per_node: int = 1
    precision: str = "bf16-mixed"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The dense model's Hugging Face config, from the package."""
        return json.loads((CONFIGS / f"{self.dense}.json").read_text())

    @cached_property
    def architecture(self) -> Architecture:
        """The dense model's numbers, from the config that the package ships."""
        return architecture(self.config)

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.num_nodes * self.num_gpus_per_node

    def on_ranks(self, world_size: int) -> "Recipe":
        """Return the recipe on so many ranks: on its one node, or on nodes as full as its own.

        Raises:
            UpcyclingError: They do not fill the nodes.
        """
        if world_size < 1:
            raise UpcyclingError(f"The world size is {world_size}; expected 1 or more.")
        if self.num_nodes == 1 or world_size < self.num_gpus_per_node:
            return replace(self, num_nodes=1, num_gpus_per_node=world_size)
        if world_size % self.num_gpus_per_node:
            raise UpcyclingError(
                f"{world_size} ranks do not fill nodes of num_gpus_per_node="
                f"{self.num_gpus_per_node}; use a multiple, or say num_gpus_per_node."
            )
        return replace(self, num_nodes=world_size // self.num_gpus_per_node)

    def architecture_of(self, dense_checkpoint: str | None) -> Architecture:
        """Return the numbers of a dense checkpoint, of the recipe's own model if it is not here.

        A recipe can be printed and planned without its checkpoint at hand.
        """
        if dense_checkpoint is not None:
            first = split_sources(dense_checkpoint)[0]
            if is_checkpoint(Path(first)):
                return architecture(open_checkpoint(first).config)
        return self.architecture


_SIZES = ("num_nodes", "num_gpus_per_node", "precision")
_PREFIXES = ("trainer.strategy.", "trainer.plugins.", "trainer.", "model.config.")
_ALIASES = {"trainer.devices": "num_gpus_per_node"}


def arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of a recipe's factory that decide its plan, with their types."""
    moe = recipe.upcycling.num_moe_experts is not None
    kinds = (UpcyclingConfig, ParallelFolding) if moe else (ParallelFolding,)
    found = {field.name: field.type for kind in kinds for field in fields(kind)}
    found |= {field.name: field.type for field in fields(Recipe) if field.name in _SIZES}
    if moe:
        return {"expansion_rate": int | None} | found
    return {name: kind for name, kind in found.items() if not name.startswith("expert_")}


def defaults(recipe: Recipe) -> dict[str, Any]:
    """Return what these arguments are where they are not given."""
    values = {**vars(recipe), **vars(recipe.folding), **vars(recipe.upcycling)}
    chosen = {"expansion_rate": None, "num_moe_experts": None}
    return {name: (values | chosen)[name] for name in arguments(recipe)}


def with_arguments(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with other numbers.

    Args:
        recipe: The recipe.
        values: By name: fields of `UpcyclingConfig`, `ParallelFolding` and `Recipe`, and
            `expansion_rate`. A `num_moe_experts` of None is expansion_rate · granularity.

    Raises:
        UpcyclingError: A value is out of range or contradicts another, or there is no such
            initialiser.
    """
    upcycling = _fields_of(UpcyclingConfig, values)
    _check_initializer(upcycling.get("initializer", recipe.upcycling.initializer))
    if recipe.upcycling.num_moe_experts is not None:
        upcycling["num_moe_experts"] = _experts(recipe.upcycling, values)
    return replace(
        recipe,
        upcycling=replace(recipe.upcycling, **upcycling),
        folding=replace(recipe.folding, **_fields_of(ParallelFolding, values)),
        **{name: value for name, value in values.items() if name in _SIZES},
    )


def _check_initializer(text: str) -> None:
    if text != "copy":  # numpy, which a plan does without, takes as long as all the rest of it
        from nemo_upcycle.initializers import make_initializer

        make_initializer(text)


def _experts(upcycling: UpcyclingConfig, values: Mapping[str, Any]) -> int:
    """Return E·G, of what is said of the three."""
    experts, rate = values.get("num_moe_experts"), values.get("expansion_rate")
    granularity = values.get("granularity", upcycling.granularity)
    if experts is None:
        return (upcycling.expansion_rate if rate is None else rate) * granularity
    if rate is not None and rate * granularity != experts:
        raise UpcyclingError(
            f"num_moe_experts is {experts}, but expansion_rate={rate} and granularity="
            f"{granularity} make {rate * granularity} experts. Leave one of them out."
        )
    return experts


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Return the recipe with other arguments.

    Args:
        recipe: The recipe.
        settings: `KEY=VALUE`, with the names of the factory's arguments or of `nemo llm pretrain`
            (`trainer.strategy.tensor_model_parallel_size`).

    Raises:
        UpcyclingError: A key is not known, or its value is not of its type.
    """
    known, values = arguments(recipe), {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        name = _plain_name(key)
        if not equals or name not in known:
            raise UpcyclingError(
                f"{setting!r} is not an argument of {recipe.name}; expected KEY=VALUE with one "
                f"of: {', '.join(known)}."
            )
        values[name] = _parse(key, text, known[name])
    return with_arguments(recipe, values)


def _plain_name(key: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
    return _ALIASES.get(key, key.removeprefix(prefix))


def _fields_of(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _parse(key: str, text: str, kind: Any) -> Any:
    """Return a value of the type that was declared, out of what was typed."""
    if kind is str:
        return text.strip("'\"")
    try:
        value = ast.literal_eval(text[:1].upper() + text[1:] if text.isalpha() else text)
    except (ValueError, SyntaxError):
        value = text
    expected = get_args(kind) or (kind,)
    if type(value) is int and float in expected:
        return float(value)
    if type(value) not in expected and str in expected:
        return text.strip("'\"")
    if type(value) not in expected:
        names = " or ".join("None" if k is type(None) else k.__name__ for k in expected)
        raise UpcyclingError(f"{key}={text}: expected {names}.")
    return value


def recipe_named(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        UpcyclingError: There is none.
    """
    if name not in RECIPES:
        raise UpcyclingError(f"There is no recipe {name!r}; expected one of: {', '.join(RECIPES)}.")
    return RECIPES[name]


def architecture(config: dict[str, Any]) -> Architecture:
    """Return the numbers of a parsed Hugging Face config."""
    return family_of(config).architecture(config)


LLAMA3_8B_E8T2 = Recipe(
    name="llama3_8b_e8t2",
    dense="llama3_8b",
    # Stated by the paper: 8 experts, top-2, Mixtral-type router, capacity factor 4.
    upcycling=UpcyclingConfig(
        num_moe_experts=8,
        moe_router_topk=2,
        moe_router_pre_softmax=False,
        moe_expert_capacity_factor=4.0,
    ),
    # Stated: TP2 EP8 PP4 VPP8, expert-TP 1. CP 2 is Table 2's, whose rows with TP2 all have it.
    folding=ParallelFolding(
        tensor_model_parallel_size=2,
        context_parallel_size=2,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=8,
        expert_model_parallel_size=8,
        expert_tensor_parallel_size=1,
    ),
    schedule=Schedule(
        # Chosen: the length that the paper counts its FLOPs at, and Llama 3's own.
        seq_length=8192,
        # Chosen: 4.2M tokens; arXiv 2410.07524 finds 4M better than 2M and 32M.
        global_batch_size=512,
        micro_batch_size=1,
        # Stated: 100B tokens = 23,842 steps of 512 · 8192.
        max_steps=-(-100_000_000_000 // (512 * 8192)),
        # Stated: 3e-5 → 3e-7, cosine, 100 warm-up steps.
        lr=3e-5,
        min_lr=3e-7,
        warmup_steps=100,
        val_check_interval=500,
        checkpoint_interval=500,
    ),
    # Stated: 512 H100.
    num_nodes=64,
    num_gpus_per_node=8,
)

# Chosen to learn something in minutes on two cores.
_TINY = Schedule(
    seq_length=256,
    global_batch_size=16,
    micro_batch_size=4,
    max_steps=250,
    lr=3e-3,
    min_lr=3e-4,
    warmup_steps=20,
    val_check_interval=50,
    checkpoint_interval=50,
)

LLAMA3_8B_DENSE = replace(
    LLAMA3_8B_E8T2,
    name="llama3_8b_dense",
    upcycling=UpcyclingConfig(num_moe_experts=None),
    # Chosen: the MoE's own; without experts there is nothing to spread over EP.
    folding=replace(LLAMA3_8B_E8T2.folding, expert_model_parallel_size=1),
)
"""The control: the dense model trained on, over the same tokens in the same order."""

LLAMA_TINY = Recipe(
    name="llama_tiny",
    dense="llama_tiny",
    upcycling=UpcyclingConfig(num_moe_experts=None),
    folding=ParallelFolding(),
    schedule=_TINY,
    precision="32",
)

LLAMA_TINY_E8T2 = Recipe(
    name="llama_tiny_e8t2",
    dense="llama_tiny",
    upcycling=UpcyclingConfig(num_moe_experts=8, moe_router_topk=2),
    folding=ParallelFolding(),
    schedule=replace(_TINY, max_steps=100),
    precision="32",
)

RECIPES = {
    recipe.name: recipe for recipe in (LLAMA3_8B_E8T2, LLAMA3_8B_DENSE, LLAMA_TINY, LLAMA_TINY_E8T2)
}
