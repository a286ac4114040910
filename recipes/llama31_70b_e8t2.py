"""Llama 3.1 70B upcycled into 8 experts, top-2."""

from nemo_upcycle_recipes.numbers import LLAMA31_70B_E8T2
from nemo_upcycle_recipes.upcycled import pretrain_recipe_of

NAME = LLAMA31_70B_E8T2.name

pretrain_recipe = pretrain_recipe_of(
    LLAMA31_70B_E8T2, "Upcycle Llama 3.1 70B into 8 experts, top-2, and train it on 100B tokens."
)
