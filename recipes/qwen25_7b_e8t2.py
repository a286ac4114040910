"""Qwen2.5 7B upcycled into 8 experts, top-2."""

from nemo_upcycle_recipes.numbers import QWEN25_7B_E8T2
from nemo_upcycle_recipes.upcycled import pretrain_recipe_of

NAME = QWEN25_7B_E8T2.name

pretrain_recipe = pretrain_recipe_of(
    QWEN25_7B_E8T2, "Upcycle Qwen2.5 7B into 8 experts, top-2, and train it on 100B tokens."
)
