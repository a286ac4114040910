"""The arguments of a recipe's factory, with the names of the command line."""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, get_args

from nemo_upcycle_recipes.recipe import OF_RECIPE, OF_SCHEDULE, Recipe, Schedule

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError

_PREFIXES = ("trainer.strategy.", "trainer.plugins.", "trainer.", "model.config.", "data.")
_ALIASES = {"trainer.devices": "num_gpus_per_node"}


def arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of a recipe's factory that decide its plan, with their types."""
    moe = recipe.upcycling.num_moe_experts is not None
    kinds = (UpcyclingConfig, ParallelFolding) if moe else (ParallelFolding,)
    types = {field.name: field.type for kind in kinds for field in fields(kind)}
    for kind, names in ((Recipe, OF_RECIPE), (Schedule, OF_SCHEDULE)):
        types |= {field.name: field.type for field in fields(kind) if field.name in names}
    if moe:
        return {"expansion_rate": int | None} | types
    return {name: kind for name, kind in types.items() if not name.startswith("expert_")}


def defaults(recipe: Recipe) -> dict[str, Any]:
    """Return the defaults of these arguments."""
    parts = (recipe, recipe.folding, recipe.upcycling, recipe.schedule)
    values = {name: value for part in parts for name, value in vars(part).items()}
    chosen = {"expansion_rate": None, "num_moe_experts": None}
    return {name: (values | chosen)[name] for name in arguments(recipe)}


def with_arguments(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with other numbers.

    Args:
        recipe: The recipe.
        values: Values by name: fields of `UpcyclingConfig`, `ParallelFolding`, `Schedule` and
            `Recipe`, and `expansion_rate`. A `num_moe_experts` of None means
            expansion_rate · granularity.

    Raises:
        UpcyclingError: A value is out of range or contradicts another, or there is no such
            initializer.
    """
    return replace(
        recipe,
        upcycling=with_experts(recipe.upcycling, values),
        folding=replace(recipe.folding, **_fields_of(ParallelFolding, values)),
        schedule=replace(
            recipe.schedule, **{name: values[name] for name in OF_SCHEDULE if name in values}
        ),
        **{name: values[name] for name in OF_RECIPE if name in values},
    )


def with_experts(upcycling: UpcyclingConfig, values: Mapping[str, Any]) -> UpcyclingConfig:
    """Return what the feed-forward layers become with other numbers.

    Args:
        upcycling: What they become without.
        values: Values by name: fields of `UpcyclingConfig`, and `expansion_rate`. Other names are
            ignored. A `num_moe_experts` of None means expansion_rate · granularity.

    Raises:
        UpcyclingError: A value is out of range or contradicts another, or there is no such
            initializer.
    """
    fields_of = _fields_of(UpcyclingConfig, values)
    _check_initializers(
        fields_of.get("initializer", upcycling.initializer),
        fields_of.get("router_initializer", upcycling.router_initializer),
    )
    if upcycling.num_moe_experts is not None:
        fields_of["num_moe_experts"] = _experts(upcycling, values)
    return replace(upcycling, **fields_of)


def _check_initializers(initializer: str, router_initializer: str) -> None:
    # Importing numpy, which a plan does not need, would double a plan's time.
    if (initializer, router_initializer) != ("copy", "virtual_groups"):
        from nemo_upcycle.initializers import make_initializer, make_router_initializer

        make_initializer(initializer)
        make_router_initializer(router_initializer)


def _experts(upcycling: UpcyclingConfig, values: Mapping[str, Any]) -> int:
    """Return E·G from whichever of E·G, E and G are given."""
    experts, rate = values.get("num_moe_experts"), values.get("expansion_rate")
    granularity = values.get("granularity", upcycling.granularity)
    fewest = 2 if granularity == 1 else 1
    if rate is not None and rate < fewest:
        raise UpcyclingError(
            f"expansion_rate is {rate}; expected {fewest} or more with granularity={granularity}: "
            "the copies of the dense feed-forward layer."
        )
    if experts is None:
        return (upcycling.expansion_rate if rate is None else rate) * granularity
    if rate is not None and rate * granularity != experts:
        raise UpcyclingError(
            f"num_moe_experts is {experts}, but expansion_rate={rate} and granularity="
            f"{granularity} make {rate * granularity} experts. Leave one of them out."
        )
    return experts


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Return the recipe with other arguments; see `parse` and `with_arguments`."""
    return with_arguments(recipe, parse(recipe, settings))


def parse(recipe: Recipe, settings: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of a command line as values by name.

    Args:
        recipe: The recipe.
        settings: `KEY=VALUE`, with the names of the factory's arguments or of `nemo llm pretrain`
            (`trainer.strategy.tensor_model_parallel_size`).

    Raises:
        UpcyclingError: A key is unknown, or a value has the wrong type.
    """
    known = arguments(recipe)
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        name = plain_name(key)
        if name == "dense_checkpoint":
            raise UpcyclingError(
                f"{setting!r} is an argument of the factory; expected --dense {text or 'DIR'}, "
                "the option of `plan` and `tune` for a dense checkpoint."
            )
        if not equals or name not in known:
            raise UpcyclingError(
                f"{setting!r} is not an argument of {recipe.name}; expected KEY=VALUE with one "
                f"of: {', '.join(known)}."
            )
        values[name] = _parse(key, text, known[name])
    return values


def plain_name(key: str) -> str:
    """Return an argument's name without the prefix that `nemo llm pretrain` uses."""
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
    return _ALIASES.get(key, key.removeprefix(prefix))


def _fields_of(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _parse(key: str, text: str, kind: Any) -> Any:
    """Return a typed text as a value of the declared type."""
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
        raise UpcyclingError(f"{key} is {text}; expected {names}.")
    return value
