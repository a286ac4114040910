"""Mistral 7B v0.3 upcycled into 8 experts, top-2."""

from nemo_upcycle_recipes.numbers import MISTRAL_7B_E8T2
from nemo_upcycle_recipes.upcycled import pretrain_recipe_of

NAME = MISTRAL_7B_E8T2.name

pretrain_recipe = pretrain_recipe_of(
    MISTRAL_7B_E8T2, "Upcycle Mistral 7B v0.3 into 8 experts, top-2, and train it on 100B tokens."
)
