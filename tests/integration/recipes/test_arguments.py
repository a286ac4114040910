"""The arguments that commands without NeMo take are the factories'."""

import inspect

import pytest
from nemo_upcycle_recipes.arguments import arguments
from nemo_upcycle_recipes.numbers import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_arguments_are_the_factorys(name: str) -> None:
    from nemo_upcycle_recipes import llama_tiny
    from nemo_upcycle_recipes.upcycled import FACTORIES

    factories = FACTORIES | {
        "llama_tiny": llama_tiny.dense_recipe,
        "llama_tiny_e8t2": llama_tiny.upcycled_recipe,
    }
    known = inspect.signature(factories[name]).parameters
    assert set(arguments(RECIPES[name])) <= set(known)
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
